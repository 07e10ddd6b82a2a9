"""Colours and type of pages and pictures, light and dark: the only place that names a colour."""

_LIGHT = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2", "#a16207", "#64748b")
_DARK = ("#7aa2ff", "#fbbf24", "#34d399", "#f472b6", "#a78bfa", "#22d3ee", "#d6b35a", "#94a3b8")
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "1 4", "12 4", "6 2 1 2")
NUM_COLOURS = len(_LIGHT)
"""Classes ``s0``, ``s1``, ... are lines, ``f0``, ``f1``, ... areas; equal numbers have equal colours."""


def _colours(colours: tuple[str, ...]) -> str:
    return "".join(f".s{i}{{stroke:{colour}}}.f{i}{{fill:{colour}}}" for i, colour in enumerate(colours))


PICTURES = (
    "text{font:11px system-ui,'DejaVu Sans',sans-serif;fill:#555}text.strong{fill:#222;font-weight:600}"
    "text.heading{font-size:14px;fill:#222;font-weight:600}"
    ".axis{stroke:#888}.grid{stroke:#e5e5e5}.line{fill:none;stroke-width:1.6}.thick{stroke-width:2.8}"
    ".bar,.heat{fill:#2563eb}.warm{fill:#c2410c}.paper{fill:#fff}.free{fill:none;stroke:#bbb;stroke-dasharray:3 3}"
    ".edge{fill:none;stroke:#888}"
    + _colours(_LIGHT)
    + "".join(f".d{i}{{stroke-dasharray:{dash}}}" for i, dash in enumerate(_DASHES) if dash)
)
DARK_PICTURES = (
    "text{fill:#aaa}text.strong,text.heading{fill:#eee}.grid{stroke:#333}.bar,.heat{fill:#7aa2ff}.warm{fill:#fb923c}"
    ".paper{fill:#161616}.free{stroke:#555}" + _colours(_DARK)
)
PAGE = (
    ":root{color-scheme:light dark}"
    "body{font:14px/1.5 system-ui,sans-serif;max-width:1040px;margin:2em auto;padding:0 1em;color:#222;background:#fff}"
    "h1{font-size:21px;margin:0 0 .3em}h2{font-size:16px;margin:2em 0 .4em}h3{font-size:13px;margin:1.2em 0 .2em}"
    "svg{width:100%;height:auto;display:block}code{font-size:12.5px}p,li{max-width:80ch}.note{color:#666;font-size:13px}"
    ".scroll{overflow-x:auto}table{border-collapse:collapse;font-size:13px;margin:.4em 0}"
    "th,td{padding:3px 10px 3px 0;text-align:left;vertical-align:top;border-bottom:1px solid #e5e5e5}"
    "th{font-weight:600;white-space:nowrap}td.number,th.number{text-align:right;font-variant-numeric:tabular-nums}"
    "tr.strong td{font-weight:600}"
    ".figures{display:flex;flex-wrap:wrap;gap:.6em 2.2em;margin:1em 0;padding:0}"
    ".figures div{min-width:7em}.figures b{display:block;font-size:20px}.figures span{color:#666;font-size:12.5px}"
    "summary{cursor:pointer;color:#2563eb;margin:.6em 0}"
)
DARK_PAGE = (
    "body{background:#161616;color:#ddd}th,td{border-color:#333}.note,.figures span{color:#aaa}summary{color:#7aa2ff}"
)


def for_page() -> str:
    return f"{PAGE}{PICTURES}@media (prefers-color-scheme:dark){{{DARK_PAGE}{DARK_PICTURES}}}"


def for_picture() -> str:
    """Of one that stands alone; light and dark."""
    return f"{PICTURES}@media (prefers-color-scheme:dark){{{DARK_PICTURES}}}"
