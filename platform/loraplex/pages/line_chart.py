"""Lines over a common axis, with a legend when there are several."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from loraplex.pages import svg
from loraplex.pages.scale import Scale, round_top, short, spanned
from loraplex.pages.style import NUM_COLOURS

_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 14, 12, 36
_LEGEND, _LEGEND_ROW = 190, 18


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    name: str
    x: Sequence[float]
    y: Sequence[float]
    """As many as ``x``; the line has a gap where one is not finite."""


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    y_low: float = 0.0,
    y_high: float | None = None,
    x_log: bool = False,
    dots: bool = True,
    height: int = 240,
    heading: str = "",
) -> str:
    """The first of several series is the thick one. ``y_high`` None: a round number above all. ``dots`` mark the points
    and tell their values under the mouse."""
    has_legend = len(series) > 1
    top = _TOP + (22 if heading else 0)
    height = max(height, top + _BOTTOM + _LEGEND_ROW * len(series)) if has_legend else height
    right = svg.WIDTH - (_LEGEND if has_legend else 0) - _RIGHT
    x_low, x_high = spanned([x for one in series for x in one.x])
    if y_high is None:
        y_high = round_top(y_low, spanned([y for one in series for y in one.y])[1])
    across = Scale(low=x_low, high=x_high, start=_LEFT, end=right, is_log=x_log)
    up = Scale(low=y_low, high=y_high, start=height - _BOTTOM, end=top)
    parts = [svg.words(_LEFT, 16, heading, anchor="start", kind="heading")] if heading else []
    parts += [*x_axis(across, x_label, height - _BOTTOM), *y_axis(up, y_label, _LEFT, right)]
    # Dashes over the thick line: where lines coincide, both are seen.
    for index in range(len(series)):
        parts += _drawn(series[index], _classes(index, len(series)), index, across, up, dots=dots)
    if has_legend:
        for index, one in enumerate(series):
            y = top + 6 + index * _LEGEND_ROW
            parts.append(svg.line(right + 16, y, right + 44, y, _classes(index, len(series))))
            parts.append(svg.words(right + 50, y + 4, svg.fitting(one.name, _LEGEND - 50), anchor="start"))
    return svg.picture(height, parts, label=heading or y_label)


def x_axis(across: Scale, label: str, y: float) -> list[str]:
    parts = [svg.line(across.start, y, across.end, y, "axis")]
    parts += [svg.words(across(value), y + 15, short(value)) for value in across.ticks(8)]
    return [*parts, svg.words((across.start + across.end) / 2, y + 31, label)]


def y_axis(up: Scale, label: str, left: float, right: float) -> list[str]:
    middle = (up.start + up.end) / 2
    parts = [
        f'<text x="13" y="{middle:.1f}" transform="rotate(-90 13 {middle:.1f})" text-anchor="middle">'
        f"{escape(label)}</text>"
    ]
    for value in up.ticks(5):
        y = up(value)
        parts += [svg.line(left, y, right, y, "grid"), svg.words(left - 6, y + 4, short(value), anchor="end")]
    return parts


def _classes(index: int, count: int) -> str:
    colour = index % NUM_COLOURS
    return f"line thick s{colour}" if index == 0 and count > 1 else f"line s{colour} d{colour}"


def _drawn(one: Series, kind: str, index: int, across: Scale, up: Scale, *, dots: bool) -> list[str]:
    points = [
        (across(x), up(min(max(y, up.low), up.high))) if math.isfinite(y) else None
        for x, y in zip(one.x, one.y, strict=True)
    ]
    parts, run = [], []
    for point in [*points, None]:
        if point is not None:
            run.append(point)
            continue
        if len(run) > 1:
            joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in run)
            parts.append(f'<polyline points="{joined}" class="{kind}"/>')
        elif run and not dots:
            parts.append(_dot(*run[0], index))
        run = []
    if dots:
        for x, y, point in zip(one.x, one.y, points, strict=True):
            if point is not None:
                parts.append(_dot(*point, index, f"{one.name}, {x:.4g}: {y:.4g}"))
    return parts


def _dot(x: float, y: float, index: int, tip: str = "") -> str:
    size = 3.4 if index == 0 else 2.6
    title = f"<title>{escape(tip)}</title>" if tip else ""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" class="f{index % NUM_COLOURS}">{title}</circle>'
