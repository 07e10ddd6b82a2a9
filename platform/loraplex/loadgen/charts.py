"""Runs as pictures, several over one another: before and after, measured and predicted. Pure. Called by ``page`` and by
notebooks."""

from collections.abc import Sequence

import numpy as np

from loraplex.loadgen.outcomes import Outcomes
from loraplex.pages.line_chart import Series, line_chart
from loraplex.pages.page import table
from loraplex.simulator.types import FloatArray, IntArray, Slo

Sides = Sequence[tuple[str, Outcomes]]
"""Names and what came of the requests; the first is the thick line."""

_BINS = 40
_SCALES = np.geomspace(0.25, 4.0, 33)
_QUANTILES = np.linspace(0.005, 0.995, 100)


def scale_chart(sides: Sides, slo: Slo) -> str:
    """Attainment with all targets times a factor."""
    lines = [
        Series(name=name, x=_SCALES.tolist(), y=[float(np.mean(side.good(slo, scale))) for scale in _SCALES])
        for name, side in sides
    ]
    return line_chart(lines, x_label="targets times", y_label="attainment", y_high=1.0, x_log=True, dots=False)


def timeline_chart(sides: Sides, slo: Slo) -> str:
    """Attainment over time, by when the requests were due."""
    lines = []
    for name, side in sides:
        middle_s, bins = _bins(side.at_s)
        good, all_ = np.bincount(bins[side.good(slo)], minlength=_BINS), np.bincount(bins, minlength=_BINS)
        with np.errstate(invalid="ignore"):
            lines.append(Series(name=name, x=middle_s, y=(good / all_).tolist()))
    return line_chart(lines, x_label="seconds", y_label="attainment", y_high=1.0, dots=False)


def ttft_chart(sides: Sides) -> str | None:
    """Shares of the requests by their time to first token; None when no request has one."""
    return _distribution([(name, side.ttft_s) for name, side in sides])


def tpot_chart(sides: Sides) -> str | None:
    """The same by their time per output token."""
    return _distribution([(name, side.tpot_s) for name, side in sides])


def rate_chart(outcomes: Outcomes) -> str:
    """Requests per second over time."""
    middle_s, bins = _bins(outcomes.at_s)
    step_s = middle_s[1] - middle_s[0]
    line = Series(name="requests/s", x=middle_s, y=(np.bincount(bins, minlength=_BINS) / step_s).tolist())
    return line_chart([line], x_label="seconds", y_label="requests/s", dots=False)


def sides_table(sides: Sides, slo: Slo) -> str:
    """A row for each side: requests, those answered, attainment, percentiles over these."""
    rows = [
        [
            name,
            len(side),
            int(np.count_nonzero(side.served)),
            f"{np.mean(side.good(slo)):.1%}",
            *(_percentile_ms(values, percent) for values in (side.ttft_s, side.tpot_s) for percent in (50, 99)),
        ]
        for name, side in sides
    ]
    columns = ["", "requests", "answered", "attainment", "TTFT p50 ms", "TTFT p99 ms", "TPOT p50 ms", "TPOT p99 ms"]
    return table(columns, rows)


def _distribution(sides: Sequence[tuple[str, FloatArray]]) -> str | None:
    """Cumulative, over all requests: what has no answer keeps the curve below 1."""
    lines = []
    for name, values in sides:
        served = values[np.isfinite(values) & (values > 0)]
        share = np.count_nonzero(np.isfinite(values)) / max(len(values), 1)
        if len(served):
            x = 1e3 * np.quantile(served, _QUANTILES)
            lines.append(Series(name=name, x=x.tolist(), y=(_QUANTILES * share).tolist()))
    if not lines:
        return None
    return line_chart(lines, x_label="ms", y_label="share of requests", y_high=1.0, x_log=True, dots=False)


def _bins(at_s: FloatArray) -> tuple[list[float], IntArray]:
    """Middles of equal parts of the run, and in which of them each request was due."""
    start_s, end_s = float(at_s.min()), float(at_s.max())
    step_s = max(end_s - start_s, 1e-3) / _BINS
    middle_s = start_s + (np.arange(_BINS) + 0.5) * step_s
    return middle_s.tolist(), np.minimum((at_s - start_s) // step_s, _BINS - 1).astype(np.int32)


def _percentile_ms(values: FloatArray, percent: int) -> float | None:
    served = values[np.isfinite(values)]
    return 1e3 * float(np.percentile(served, percent)) if len(served) else None
