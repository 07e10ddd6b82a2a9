"""Pictures as files of their own: SVG with its style inside, and PNG."""

from functools import cache

import resvg_py

from loraplex.core.errors import Unavailable
from loraplex.pages import style, svg

_FONTS = ("DejaVu Sans", "Liberation Sans", "Noto Sans", "Arial", "Helvetica", "Open Sans", "Roboto", "Ubuntu")


def standalone(picture: str) -> str:
    """A picture that any viewer opens, on its own background."""
    start, _, rest = picture.partition(">")
    return f'{start}><style>{style.for_picture()}</style><rect width="100%" height="100%" class="paper"/>{rest}\n'


def png(picture: str, *, width: int = 2 * svg.WIDTH) -> bytes:
    """Light, ``width`` pixels wide. Unavailable on a machine without a usual font: its words would be missing."""
    return resvg_py.svg_to_bytes(svg_string=standalone(picture), width=width, sans_serif_family=_font())


@cache
def _font() -> str:
    """One that is installed: a renderer that finds none draws no words, and does not say so."""
    for name in _FONTS:
        if _drawn("M", name) != _drawn("", name):
            return name
    raise Unavailable(f"a PNG needs one of the fonts {', '.join(_FONTS)}, and none is installed; write an SVG")


def _drawn(word: str, font: str) -> bytes:
    text = f'<text x="2" y="15" font-family="{font}">{word}</text>'
    return resvg_py.svg_to_bytes(svg_string=f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 20 20">{text}</svg>')
