"""Bars side by side: the same groups as several sides have them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from loraplex.pages import svg
from loraplex.pages.line_chart import y_axis
from loraplex.pages.scale import Scale, round_top, spanned
from loraplex.pages.style import NUM_COLOURS

_LEFT, _RIGHT, _TOP, _LINE = 60, 14, 30, 14
_GAP = 0.24
"""Between groups, of a group's width."""
_WIDEST, _READABLE = 80, 30
"""Of a bar; the least width over which its value stands."""
_LETTER = 6.6


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    name: str
    values: Sequence[float]
    """One a group, not negative; no bar where one is not finite."""


def grouped_bars(
    groups: Sequence[str],
    series: Sequence[Bars],
    *,
    y_label: str,
    x_label: str = "",
    y_high: float | None = None,
    height: int = 280,
) -> str:
    """``groups``: their names, of one or more lines. ``y_high`` None: a round number above all. Values stand over bars
    that are wide enough and under the mouse, names of the ``series`` above, if there are several."""
    lines = max((name.count("\n") + 1 for name in groups), default=1)
    bottom = 8 + _LINE * (lines + bool(x_label))
    top = _TOP + (18 if len(series) > 1 else 0)
    if y_high is None:
        y_high = round_top(0, max(0.0, spanned([value for one in series for value in one.values])[1]))
    up = Scale(low=0, high=y_high, start=height - bottom, end=top)
    step = (svg.WIDTH - _LEFT - _RIGHT) / max(len(groups), 1)
    width = min(step * (1 - _GAP) / max(len(series), 1), _WIDEST)
    parts = y_axis(up, y_label, _LEFT, svg.WIDTH - _RIGHT)
    for index, name in enumerate(groups):
        middle = _LEFT + (index + 0.5) * step
        there = [place for place, one in enumerate(series) if math.isfinite(one.values[index])]
        x = middle - width * len(there) / 2
        for place in there:
            parts += _bar(x, width, up, place, series[place], index, " ".join(name.splitlines()))
            x += width
        for row, words in enumerate(name.splitlines()):
            parts.append(svg.words(middle, up.start + (row + 1) * _LINE, svg.fitting(words, step)))
    if x_label:
        parts.append(svg.words((_LEFT + svg.WIDTH - _RIGHT) / 2, height - 4, x_label))
    return svg.picture(height, [*parts, *(_legend(series) if len(series) > 1 else [])], label=y_label)


def _bar(x: float, width: float, up: Scale, place: int, one: Bars, index: int, group: str) -> list[str]:
    value = one.values[index]
    shown = f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    y = up(min(value, up.high))
    tip = f"{one.name}, {group}: {shown}"
    parts = [svg.box(x, y, width - 1, up.start - y, f"f{place % NUM_COLOURS}", tip=tip)]
    return [*parts, svg.words(x + width / 2, y - 4, shown)] if width >= _READABLE else parts


def _legend(series: Sequence[Bars]) -> list[str]:
    parts: list[str] = []
    x = float(_LEFT)
    for place, one in enumerate(series):
        parts.append(svg.box(x, 5, 12, 12, f"f{place % NUM_COLOURS}"))
        parts.append(svg.words(x + 18, 15, one.name, anchor="start"))
        x += 18 + len(one.name) * _LETTER + 24
    return parts
