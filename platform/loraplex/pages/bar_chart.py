"""Bars: a histogram."""

from collections.abc import Sequence

from loraplex.pages import svg
from loraplex.pages.line_chart import y_axis
from loraplex.pages.scale import Scale, round_top

_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 14, 12, 36
_WIDEST = 96


def bar_chart(
    labels: Sequence[str],
    counts: Sequence[float],
    *,
    x_label: str,
    y_label: str,
    tips: Sequence[str],
    height: int = 220,
) -> str:
    """``labels`` [B + 1] at the edges of the bars, or [B] at their middles; ``tips`` [B] show under the mouse."""
    up = Scale(low=0, high=round_top(0, max(counts, default=0)), start=height - _BOTTOM, end=_TOP)
    step = min((svg.WIDTH - _LEFT - _RIGHT) / max(len(counts), 1), _WIDEST)
    parts = y_axis(up, y_label, _LEFT, svg.WIDTH - _RIGHT)
    for index, (count, tip) in enumerate(zip(counts, tips, strict=True)):
        y = up(count)
        parts.append(svg.box(_LEFT + index * step, y, step - 1, up.start - y, "bar", tip=tip))
    shift = 0.0 if len(labels) > len(counts) else step / 2
    for index in range(0, len(labels), max(1, len(labels) // 10)):
        # The last one of an axis with edges would be cut in its middle.
        anchor = "end" if shift == 0 and index == len(counts) else "middle"
        parts.append(svg.words(_LEFT + shift + index * step, height - _BOTTOM + 15, labels[index], anchor=anchor))
    parts.append(svg.words(_LEFT + len(counts) * step / 2, height - 5, x_label))
    return svg.picture(height, parts, label=y_label)
