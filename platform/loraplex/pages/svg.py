"""Pieces of SVG, as text. All words are escaped. Colours are classes, whose values are in ``style``."""

from collections.abc import Sequence
from html import escape

WIDTH = 960
"""Of every picture, in its own units; a page scales it to its column."""
_LETTER = 6.6
"""Width of an average letter of the usual fonts at 11 units."""


def picture(height: float, parts: Sequence[str], *, label: str = "") -> str:
    """An ``svg`` element ``WIDTH`` wide."""
    named = f' aria-label="{escape(label)}"' if label else ""
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img"{named} xmlns="http://www.w3.org/2000/svg">'
        f"{''.join(parts)}</svg>"
    )


def words(x: float, y: float, text: str, *, anchor: str = "middle", kind: str = "") -> str:
    """``y``: of the base line; ``kind``: a class."""
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{named}>{escape(text)}</text>'


def box(
    x: float, y: float, width: float, height: float, kind: str, *, tip: str = "", opacity: float | None = None
) -> str:
    """A rectangle; ``tip`` shows while the mouse is over it."""
    faint = "" if opacity is None else f' fill-opacity="{opacity:.2f}"'
    start = (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{max(height, 0):.1f}" class="{kind}"{faint}'
    )
    return f"{start}><title>{escape(tip)}</title></rect>" if tip else f"{start}/>"


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def together(tip: str, parts: Sequence[str]) -> str:
    """One thing made of several; ``tip`` shows while the mouse is over any of them."""
    return f"<g><title>{escape(tip)}</title>{''.join(parts)}</g>"


def fitting(text: str, width: float) -> str:
    """As much of ``text`` as has room, with an ellipsis for the rest."""
    room = int(width / _LETTER)
    return text if len(text) <= room else text[: max(room - 1, 0)] + "…" if room > 1 else ""
