"""A replay as one self-contained HTML page: figures, curves, tenants; what was predicted beside what was measured.

Pure: outcomes in, text out. Called by the CLI.
"""

from collections.abc import Sequence

import numpy as np

from loraplex.loadgen.comparison import compare, shown_difference
from loraplex.loadgen.outcomes import Outcomes, attainment
from loraplex.loadgen.report import LoadReport
from loraplex.pages.line_chart import Series, line_chart
from loraplex.pages.page import figures, page, paragraph, section, shown, table
from loraplex.simulator.types import FloatArray, IntArray, Slo

Sides = Sequence[tuple[str, Outcomes]]

_BINS = 40
_SCALES = np.geomspace(0.25, 4.0, 33)
_QUANTILES = np.linspace(0.005, 0.995, 100)


def replay_page(
    report: LoadReport, measured: Outcomes, *, title: str, slo: Slo | None = None, predicted: Outcomes | None = None
) -> str:
    """One HTML document, UTF-8. ``predicted``: of the same requests, by a simulator."""
    sides = [("measured", measured)] if predicted is None else [("measured", measured), ("predicted", predicted)]
    parts = [_overview(report)]
    if predicted is not None:
        parts.append(_comparison(measured, predicted, slo))
    if slo is not None:
        parts += [_attainment_over_scale(sides, slo), _attainment_over_time(sides, slo)]
    parts += [
        _distribution("Time to first token", [(name, side.ttft_s) for name, side in sides]),
        _distribution("Time per output token", [(name, side.tpot_s) for name, side in sides]),
        _load_over_time(measured),
        _tenants(report, predicted, slo),
    ]
    return page(title, parts)


def _overview(report: LoadReport) -> str:
    pairs = [
        (f"{report.completed:,} of {report.requests:,}", "requests answered"),
        (shown(report.completed_rate_per_s), "answers/s"),
        (shown(report.output_tokens_per_s), "output tokens/s"),
        (f"{report.peak_streams:,}", "streams at once"),
    ]
    if report.slo is not None:
        pairs.insert(0, (_percent(report.slo.attainment) or "-", "SLO attainment"))
    errors = [
        paragraph(f"Error {kind}: {count:,} x {report.error_examples[kind]}") for kind, count in report.errors.items()
    ]
    return figures(pairs) + "".join(errors)


def _comparison(measured: Outcomes, predicted: Outcomes, slo: Slo | None) -> str:
    rows = [
        [
            figure.name if figure.is_share else f"{figure.name.removesuffix('_s')} ms",
            *(
                None if value is None else f"{value:.1%}" if figure.is_share else f"{1e3 * value:,.4g}"
                for value in (figure.measured, figure.predicted)
            ),
            shown_difference(figure),
        ]
        for figure in compare(measured, predicted, slo)
    ]
    columns = ["", "measured", "predicted", "difference"]
    return section("Predicted and measured", table(columns, rows), note="The same arrivals through the simulator.")


def _attainment_over_scale(sides: Sides, slo: Slo) -> str:
    lines = [
        Series(name=name, x=_SCALES.tolist(), y=[float(np.mean(side.good(slo, scale))) for scale in _SCALES])
        for name, side in sides
    ]
    chart = line_chart(lines, x_label="targets times", y_label="attainment", y_high=1.0, x_log=True, dots=False)
    return section("Attainment by how strict the targets are", chart, note=f"At 1: {_targets(slo)}.")


def _attainment_over_time(sides: Sides, slo: Slo) -> str:
    lines = []
    for name, side in sides:
        middle_s, bins = _bins(side.at_s)
        good, all_ = np.bincount(bins[side.good(slo)], minlength=_BINS), np.bincount(bins, minlength=_BINS)
        with np.errstate(invalid="ignore"):
            lines.append(Series(name=name, x=middle_s, y=(good / all_).tolist()))
    chart = line_chart(lines, x_label="seconds", y_label="attainment", y_high=1.0, dots=False)
    return section("Attainment over time", chart)


def _distribution(title: str, sides: Sequence[tuple[str, FloatArray]]) -> str:
    """Cumulative, over all requests: what has no answer keeps the curve below 1."""
    lines = []
    for name, values in sides:
        served = values[np.isfinite(values) & (values > 0)]
        share = np.count_nonzero(np.isfinite(values)) / max(len(values), 1)
        if len(served):
            x = 1e3 * np.quantile(served, _QUANTILES)
            lines.append(Series(name=name, x=x.tolist(), y=(_QUANTILES * share).tolist()))
    if not lines:
        return section(title, paragraph("No request has one."))
    chart = line_chart(lines, x_label="ms", y_label="share of requests", y_high=1.0, x_log=True, dots=False)
    return section(title, chart)


def _load_over_time(measured: Outcomes) -> str:
    middle_s, bins = _bins(measured.at_s)
    step_s = middle_s[1] - middle_s[0]
    line = Series(name="requests/s", x=middle_s, y=(np.bincount(bins, minlength=_BINS) / step_s).tolist())
    return section("Load", line_chart([line], x_label="seconds", y_label="requests/s", dots=False))


def _tenants(report: LoadReport, predicted: Outcomes | None, slo: Slo | None) -> str:
    columns = ["tenant", "requests", "errors", "TTFT p50 ms", "TTFT p99 ms", "TPOT p50 ms", "TPOT p99 ms"]
    columns += ["attainment"] if slo is not None else []
    columns += ["predicted"] if slo is not None and predicted is not None else []
    rows: list[list[str | float | None]] = []
    for tenant in report.tenants:
        row: list[str | float | None] = [tenant.tenant, tenant.requests, tenant.errors]
        for latency in (tenant.ttft_s, tenant.tpot_s):
            row += [None, None] if latency is None else [1e3 * latency.p50, 1e3 * latency.p99]
        if slo is not None:
            row.append(None if tenant.slo is None else _percent(tenant.slo.attainment))
            if predicted is not None:
                rows_of = predicted.tenant == predicted.tenants.index(tenant.tenant)
                row.append(_percent(attainment(predicted, slo, rows_of).attainment))
        rows.append(row)
    return section("Tenants", table(columns, rows))


def _bins(at_s: FloatArray) -> tuple[list[float], IntArray]:
    """Middles of equal parts of the run, and in which of them each request was due."""
    start_s, end_s = float(at_s.min()), float(at_s.max())
    step_s = max(end_s - start_s, 1e-3) / _BINS
    middle_s = start_s + (np.arange(_BINS) + 0.5) * step_s
    return middle_s.tolist(), np.minimum((at_s - start_s) // step_s, _BINS - 1).astype(np.int32)


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"


def _targets(slo: Slo) -> str:
    given = [("TTFT", slo.ttft_s), ("TPOT", slo.tpot_s)]
    return ", ".join(f"{name} {1e3 * seconds:.4g} ms" for name, seconds in given if np.isfinite(seconds))
