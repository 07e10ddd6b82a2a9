"""The page: title, figures, charts, style; nothing that a browser would have to fetch."""

from html import escape

import numpy as np

from loraplex.traces.plot.collect import RATE_BINS, LengthHistogram, TracePictures
from loraplex.traces.plot.svg import bar_chart, heat_map, line_chart

_STYLE = """
body{font:14px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222;background:#fff}
h1{font-size:20px}h2{font-size:15px;margin:1.6em 0 .3em}svg{width:100%;height:auto}
text{font-size:11px;fill:#555}.line{fill:none;stroke:#2563eb;stroke-width:1.2}.bar{fill:#2563eb}.heat{fill:#b91c1c}
.axis{stroke:#888}.grid{stroke:#e5e5e5}
@media (prefers-color-scheme:dark){body{background:#161616;color:#ddd}text{fill:#aaa}.grid{stroke:#333}
.line{stroke:#7aa2ff}.bar{fill:#7aa2ff}.heat{fill:#ff7a7a}}
"""


def render(pictures: TracePictures, *, title: str) -> str:
    """One HTML document, UTF-8."""
    start_s, end_s = pictures.start_s, pictures.end_s
    span_s = max(end_s - start_s, 1e-9)
    rate = pictures.rate.astype(np.float64) * (RATE_BINS / span_s)
    shown = f"{len(pictures.adapters)} busiest"
    rest = f"; {pictures.others:,} requests of others" if pictures.others else ""
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{pictures.requests:,} requests from second {start_s:,.4g} to {end_s:,.4g}.</p>",
        "<h2>Requests per second</h2>",
        line_chart(rate, start=start_s, end=end_s, x_label="seconds", y_label="requests/s"),
        f"<h2>Adapters over time ({shown}{rest}; darker is more, on a logarithmic scale)</h2>",
        heat_map(pictures.adapters, pictures.heat, start=start_s, end=end_s, x_label="seconds"),
        *_lengths("Prompt tokens", pictures.prompt_tokens),
        *_lengths("Output tokens", pictures.output_tokens),
    ]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _lengths(title: str, histogram: LengthHistogram | None) -> list[str]:
    if histogram is None:
        return [f"<h2>{title}</h2><p>The trace does not say.</p>"]
    chart = bar_chart(histogram.edges, histogram.counts, x_label="tokens", y_label="requests")
    return [f"<h2>{title}</h2>", chart]
