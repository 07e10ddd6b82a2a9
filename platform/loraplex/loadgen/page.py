"""A replay as one self-contained HTML page: figures, curves, tenants; what was predicted beside what was measured.

Pure: outcomes in, text out. Called by the CLI.
"""

import numpy as np

from loraplex.loadgen.charts import rate_chart, scale_chart, timeline_chart, tpot_chart, ttft_chart
from loraplex.loadgen.comparison import compare, shown_difference
from loraplex.loadgen.outcomes import Outcomes, attainment
from loraplex.loadgen.report import LoadReport
from loraplex.pages.page import figures, page, paragraph, section, shown, table
from loraplex.simulator.types import Slo


def replay_page(
    report: LoadReport, measured: Outcomes, *, title: str, slo: Slo | None = None, predicted: Outcomes | None = None
) -> str:
    """One HTML document, UTF-8. ``predicted``: of the same requests, by a simulator."""
    sides = [("measured", measured)] if predicted is None else [("measured", measured), ("predicted", predicted)]
    parts = [_overview(report)]
    if predicted is not None:
        parts.append(_comparison(measured, predicted, slo))
    if slo is not None:
        parts += [
            section(
                "Attainment by how strict the targets are", scale_chart(sides, slo), note=f"At 1: {_targets(slo)}."
            ),
            section("Attainment over time", timeline_chart(sides, slo)),
        ]
    parts += [
        _distribution("Time to first token", ttft_chart(sides)),
        _distribution("Time per output token", tpot_chart(sides)),
        section("Load", rate_chart(measured)),
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


def _distribution(title: str, chart: str | None) -> str:
    return section(title, paragraph("No request has one.") if chart is None else chart)


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


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"


def _targets(slo: Slo) -> str:
    given = [("TTFT", slo.ttft_s), ("TPOT", slo.tpot_s)]
    return ", ".join(f"{name} {1e3 * seconds:.4g} ms" for name, seconds in given if np.isfinite(seconds))
