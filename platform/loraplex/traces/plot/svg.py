"""Three charts as SVG text: a line over time, a heat map, bars. Knows nothing of traces; all text is escaped."""

import math
from collections.abc import Sequence
from html import escape

import numpy as np
import numpy.typing as npt

WIDTH = 960
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 12, 10, 34
_PLOT = WIDTH - _LEFT - _RIGHT
_ROW = 15
_NAME_WIDTH = 230
_Numbers = npt.NDArray[np.int64] | npt.NDArray[np.floating]


def line_chart(values: _Numbers, *, start: float, end: float, x_label: str, y_label: str, height: int = 220) -> str:
    """``values`` [N] at the middles of N equal parts from ``start`` to ``end``."""
    top = _round_up(float(values.max(initial=0.0)))
    plot = height - _TOP - _BOTTOM
    step = _PLOT / len(values)
    points = " ".join(
        f"{_LEFT + (index + 0.5) * step:.1f},{_TOP + plot * (1 - value / top):.1f}"
        for index, value in enumerate(values)
    )
    line = f'<polyline points="{points}" class="line"/>'
    return _svg(height, [*_x_axis(start, end, x_label, height), *_y_axis(top, y_label, height), line])


def bar_chart(
    edges: npt.NDArray[np.float64], counts: _Numbers, *, x_label: str, y_label: str, height: int = 220
) -> str:
    """``counts`` [B] between ``edges`` [B + 1], drawn with bars of one width: a logarithmic scale, if edges grow so."""
    top = _round_up(float(counts.max(initial=0)))
    plot = height - _TOP - _BOTTOM
    step = _PLOT / len(counts)
    parts = []
    for index, count in enumerate(counts):
        tall = plot * float(count) / top
        title = f"{edges[index]:.4g} to {edges[index + 1]:.4g}: {count}"
        parts.append(
            f'<rect x="{_LEFT + index * step:.1f}" y="{_TOP + plot - tall:.1f}" width="{step - 1:.1f}" '
            f'height="{tall:.1f}" class="bar"><title>{escape(title)}</title></rect>'
        )
    for index in range(0, len(edges), max(1, len(edges) // 8)):
        parts.append(_text(_LEFT + index * step, height - _BOTTOM + 14, f"{edges[index]:.3g}"))
    parts.append(_text(_LEFT + _PLOT / 2, height - 4, x_label))
    return _svg(height, [*_y_axis(top, y_label, height), *parts])


def heat_map(names: Sequence[str], counts: _Numbers, *, start: float, end: float, x_label: str) -> str:
    """One row for each name, ``counts`` [len(names), N] over N equal parts from ``start`` to ``end``."""
    height = _TOP + _ROW * len(names) + _BOTTOM
    left, plot = _NAME_WIDTH, WIDTH - _NAME_WIDTH - _RIGHT
    step = plot / counts.shape[1]
    largest = math.log1p(float(counts.max(initial=0))) or 1.0
    parts = []
    for row, name in enumerate(names):
        y = _TOP + row * _ROW
        parts.append(_text(left - 6, y + 11, name if len(name) <= 34 else name[:33] + "…", anchor="end"))
        for column in np.flatnonzero(counts[row]):
            count = int(counts[row, column])
            shade = math.log1p(count) / largest
            parts.append(
                f'<rect x="{left + column * step:.1f}" y="{y}" width="{step + 0.2:.1f}" height="{_ROW - 1}" '
                f'class="heat" fill-opacity="{0.08 + 0.92 * shade:.2f}"><title>{escape(name)}: {count}</title></rect>'
            )
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(_text(left + share * plot, height - _BOTTOM + 14, f"{start + share * (end - start):.4g}"))
    parts.append(_text(left + plot / 2, height - 4, x_label))
    return _svg(height, parts)


def _svg(height: int, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'


def _text(x: float, y: float, text: str, *, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _x_axis(start: float, end: float, label: str, height: int) -> list[str]:
    y = height - _BOTTOM
    parts = [f'<line x1="{_LEFT}" y1="{y}" x2="{WIDTH - _RIGHT}" y2="{y}" class="axis"/>']
    for index in range(9):
        share = index / 8
        parts.append(_text(_LEFT + share * _PLOT, y + 14, f"{start + share * (end - start):.4g}"))
    return [*parts, _text(_LEFT + _PLOT / 2, height - 4, label)]


def _y_axis(top: float, label: str, height: int) -> list[str]:
    plot = height - _TOP - _BOTTOM
    parts = [
        f'<text x="12" y="{_TOP + plot / 2}" transform="rotate(-90 12 {_TOP + plot / 2})" text-anchor="middle">'
        f"{escape(label)}</text>"
    ]
    for share in (0.0, 0.5, 1.0):
        y = _TOP + plot * (1 - share)
        parts.append(f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{WIDTH - _RIGHT}" y2="{y:.1f}" class="grid"/>')
        parts.append(_text(_LEFT - 6, y + 4, f"{share * top:.4g}", anchor="end"))
    return parts


def _round_up(value: float) -> float:
    """The next of 1, 2, 5 times a power of ten; 1 for 0."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value)
