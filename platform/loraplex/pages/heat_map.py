"""Rows of cells, stronger where there is more."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from loraplex.pages import svg
from loraplex.pages.scale import Scale, short

_RIGHT, _TOP, _BOTTOM, _ROW, _NAME = 14, 6, 36, 15, 230
_Numbers = npt.NDArray[np.int64] | npt.NDArray[np.floating]


def heat_map(
    rows: Sequence[str],
    values: _Numbers,
    *,
    x_label: str,
    tip: Callable[[int, int], str],
    x_range: tuple[float, float] | None = None,
    columns: Sequence[str] = (),
    is_log: bool = False,
    kind: Callable[[int, int], str] = lambda row, column: "heat",
) -> str:
    """``values`` [len(rows), N], not negative; cells of 0 stay empty.

    Below stand either numbers of ``x_range`` or the names of ``columns`` [N], as many as have room. ``tip`` is what a
    cell says under the mouse, ``kind`` its class: ``heat`` or ``warm``.
    """
    bottom = _TOP + _ROW * len(rows)
    step = (svg.WIDTH - _NAME - _RIGHT) / max(values.shape[1], 1)
    largest = float(values.max(initial=0)) or 1.0
    parts = []
    for row, name in enumerate(rows):
        y = _TOP + row * _ROW
        parts.append(svg.words(_NAME - 6, y + 11, svg.fitting(name, _NAME - 10), anchor="end"))
        for column in np.flatnonzero(values[row]).tolist():
            value = float(values[row, column])
            shade = math.log1p(value) / math.log1p(largest) if is_log else value / largest
            parts.append(
                svg.box(
                    _NAME + column * step,
                    y,
                    step + 0.2,
                    _ROW - 1,
                    kind(row, column),
                    tip=tip(row, column),
                    opacity=0.1 + 0.9 * shade,
                )
            )
    if x_range is not None:
        across = Scale(low=x_range[0], high=x_range[1], start=_NAME, end=svg.WIDTH - _RIGHT)
        parts += [svg.words(across(value), bottom + 14, short(value)) for value in across.ticks(8)]
    elif columns:
        every = math.ceil(max(len(name) for name in columns) * 7 / step)
        for column in range(0, len(columns), every):
            parts.append(svg.words(_NAME + (column + 0.5) * step, bottom + 14, columns[column]))
    parts.append(svg.words(_NAME + (svg.WIDTH - _NAME - _RIGHT) / 2, bottom + 30, x_label))
    return svg.picture(bottom + _BOTTOM, parts, label=x_label)
