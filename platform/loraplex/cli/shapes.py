"""Shapes as they are written on the command line: ``2x1`` is two shards and one stage."""

from loraplex.core.errors import BadConfig
from loraplex.core.plan import Shape


def parse_shape(text: str) -> Shape:
    """Raises BadConfig."""
    tp, _, pp = text.strip().partition("x")
    if not (tp.isdecimal() and pp.isdecimal() and int(tp) > 0 and int(pp) > 0):
        raise BadConfig(f"shape {text!r} is not like 2x1", param="shapes")
    return Shape(tp=int(tp), pp=int(pp))


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Several, with commas between. Raises BadConfig."""
    return tuple(map(parse_shape, text.split(",")))
