"""The report as one HTML page: figures, curves, timeline, placement, reasons, tables. Called through ``report``."""

import math
from collections.abc import Mapping

from loraplex.pages.bar_chart import bar_chart
from loraplex.pages.line_chart import Series, line_chart
from loraplex.pages.page import bullets, figures, folded, page, paragraph, section, subsection, table
from loraplex.planner.report.charts import (
    MAX_HEAT_ROWS,
    ceiling_of,
    floor_of,
    load_over_time,
    rate_chart,
    rate_over_time,
    slo_chart,
    timeline_chart,
)
from loraplex.planner.report.placement import (
    MAX_ADAPTERS,
    MAX_GPUS,
    MAX_GROUPS,
    adapters_of,
    adapters_picture,
    gpus_picture,
    label,
)
from loraplex.planner.report.values import PlanReport

_WORST = 15
_MAX_STEPS = 12


def render(report: PlanReport, *, title: str, given: Mapping[str, str]) -> str:
    """One HTML document, UTF-8. ``given``: what was asked for (trace, fleet, targets), shown as it is."""
    parts = [_figures(report), table(["given", ""], [[name, value] for name, value in given.items()])]
    if report.found.kept:
        parts.append(paragraph("The current plan stays: no other is better by more than its move costs."))
    parts += [_policies(report), _curves(report), _timeline(report), _placement(report), _reasons(report)]
    if report.found.move is not None:
        parts.append(_move(report))
    return page(title, [*parts, _worst(report)])


def _figures(report: PlanReport) -> str:
    others = sorted(report.policies[1:], key=lambda one: -one.score.attainment)
    planned = sum(group.shape.num_ranks for group in report.plan.groups)
    pairs = [(f"{report.score.attainment:.2%}", "of the requests within their targets")]
    if others:
        pairs.append((f"{others[0].score.attainment:.2%}", f"by {others[0].policy}, the best other"))
    pairs += [
        (f"{report.found.bound:.2%}", "at most, by the fluid bound on the planning trace"),
        (f"{planned} of {sum(node.num_gpus for node in report.nodes)}", "GPUs in groups"),
        (f"{report.gpus_bound:.1f}", "GPUs at least for 99 %, by the same bound"),
        (f"{report.score.num_requests:,}", "requests scored"),
    ]
    return figures(pairs)


def _policies(report: PlanReport) -> str:
    note = "Each tuned on the planning trace (when planned), then simulated on the trace that is scored."
    return section("Policies", policies_table(report), note=note)


def policies_table(report: PlanReport) -> str:
    """The plan, the baselines and the bound."""
    columns = ["policy", "attainment", "goodput/s", "TTFT p50 ms", "TTFT p99 ms", "TPOT p50 ms", "TPOT p99 ms"]
    rows: list[list[str | float | None]] = [
        [
            one.policy,
            one.score.attainment,
            one.score.goodput_per_s,
            *(1000 * values[name] for values in (one.score.ttft_s, one.score.tpot_s) for name in ("p50", "p99")),
            one.planned,
            one.setting or f"{report.found.evaluations:,} plans scored",
        ]
        for one in report.policies
    ]
    rows.append(["fluid bound", None, None, None, None, None, None, report.found.bound, "a linear programme"])
    return table([*columns, "when planned", "best setting"], rows, strong=0)


def _curves(report: PlanReport) -> str:
    parts = [subsection("Over the SLO scale: all targets times this", slo_chart(report))]
    if report.rate_factors:
        parts.append(subsection("Over the rate: the same requests, this many times as fast", rate_chart(report)))
    return section("Attainment curves", *parts, note="The plans stay as they are; only targets or rate change.")


def _timeline(report: PlanReport) -> str:
    most = max((value for row in report.in_flight for value in row), default=0.0)
    some = f", the {MAX_HEAT_ROWS} busiest of {len(report.groups)}" if len(report.groups) > MAX_HEAT_ROWS else ""
    return section(
        "Timeline",
        subsection("Attainment", timeline_chart(report)),
        subsection("Requests per second", rate_over_time(report)),
        subsection(f"Requests in each group, waiting and running (at most {most:,.0f}){some}", load_over_time(report)),
    )


def _placement(report: PlanReport) -> str:
    groups: list[list[str | float | None]] = [
        [
            group.name,
            f"tp{group.shape.tp} pp{group.shape.pp}",
            group.gpu,
            ", ".join(dict.fromkeys(group.nodes)) or "any",
            "+".join(str(placed.base_model_id) for placed in group.bases),
            adapters_of(group),
            f"{use.busy_s / max(report.end_s, 1e-9):.0%}",
            use.num_requests,
            use.num_loads,
            use.num_preemptions,
        ]
        for group, use in zip(report.plan.groups, report.groups, strict=True)
    ]
    columns = ["group", "shape", "GPU", "nodes", "bases", "lists", "busy", "requests", "adapter loads", "preemptions"]
    num_gpus = sum(node.num_gpus for node in report.nodes)
    left_out = f" The first {MAX_GPUS} of {num_gpus} GPUs." if num_gpus > MAX_GPUS else ""
    parts = [
        gpus_picture(report),
        folded(f"The {len(groups)} groups as a table", table(columns, groups)),
    ]
    if report.adapters:
        rows = (
            f"the {MAX_ADAPTERS} busiest of {len(report.adapters):,}" if len(report.adapters) > MAX_ADAPTERS else "all"
        )
        some = f", the {MAX_GROUPS} busiest groups" if len(report.groups) > MAX_GROUPS else ""
        parts += [
            subsection(
                f"Who served whom: adapters ({rows}) by groups{some}; blue: listed there, orange: left to the router",
                adapters_picture(report),
            ),
            subsection("Adapters by the number of groups that list them", _copies(report)),
        ]
    return section(
        "Placement",
        *parts,
        note="A bar at the foot of a group is the share of the time that it was in steps; more under the mouse."
        + left_out,
    )


def _copies(report: PlanReport) -> str:
    limits = [0, 1, 2, 4, 8, 16, 32, 64]
    names = ["any group", "1", "2", "3-4", "5-8", "9-16", "17-32", "33-64", "more"]
    counts = [0] * len(names)
    for adapter in report.adapters:
        counts[sum(len(adapter.groups) > limit for limit in limits)] += 1
    last = max(index for index, count in enumerate(counts) if count)
    return bar_chart(
        names[: last + 1],
        counts[: last + 1],
        x_label="groups",
        y_label="adapters",
        tips=[f"{name}: {count:,} adapters" for name, count in zip(names, counts, strict=True)][: last + 1],
        height=170,
    )


def _reasons(report: PlanReport) -> str:
    found = report.found
    at = [step.evaluation for step in found.steps]
    parts = [subsection("Why each group has its shape", bullets(found.reasons))]
    if found.steps:
        x = [float(number) for pair in zip(at, [*at[1:], found.evaluations], strict=True) for number in pair]
        y = [step.value for step in found.steps for _ in range(2)]
        line = Series(name="best so far", x=x, y=y)
        best: list[list[str | float | None]] = []
        before = math.nan
        for step in found.steps:
            best.append([step.evaluation, step.what, step.attainment, step.value, step.value - before])
            before = step.value
        columns = ["plan scored", "what was done", "attainment", "value", "gained"]
        parts += [
            subsection(
                "What each move bought, on the sample that is searched on",
                line_chart(
                    [line],
                    x_label="plans scored",
                    y_label="value",
                    y_low=floor_of([y]),
                    y_high=ceiling_of(y),
                    dots=False,
                    height=170,
                ),
                table(columns, best[-_MAX_STEPS:]),
                folded(f"All {len(best)} moves", table(columns, best)) if len(best) > _MAX_STEPS else "",
            )
        ]
    return section(
        "Why this plan",
        *parts,
        note=(
            f"{found.evaluations:,} plans were scored; --budget {found.evaluations} with the same seed repeats it. "
            "A plan's value is its attainment less what starved tenants and the move from the current plan cost."
        ),
    )


def _move(report: PlanReport) -> str:
    move = report.found.move
    assert move is not None
    weights_gib, adapters_gib = move.weight_bytes / 2**30, move.adapter_bytes / 2**30
    rows: list[list[str | float | None]] = [
        [one.group, one.was or "new", one.weight_bytes / 2**30, one.adapter_bytes / 2**30, one.stopped_s]
        for one in move.groups
    ]
    columns = ["group", "was", "weights GiB per GPU", "adapters GiB", "stopped s"]
    return section(
        "The move from the current plan",
        table(columns, rows) if rows else "",
        note=(
            f"{len(rows)} groups change: {weights_gib:,.1f} GiB of weights and {adapters_gib:,.1f} GiB of adapters are "
            f"loaded; {move.lost_gpu_s:,.1f} GPU seconds serve nothing."
        ),
    )


def _worst(report: PlanReport) -> str:
    tenants: list[list[str | float | None]] = [[name, value] for name, value in list(report.tenants.items())[:_WORST]]
    served = [adapter for adapter in report.adapters if adapter.requests]
    served.sort(key=lambda adapter: (adapter.attainment, -adapter.requests))
    adapters: list[list[str | float | None]] = [
        [
            label(one),
            one.base_model,
            one.requests,
            one.attainment,
            ", ".join(one.groups[:6]) + (f" and {len(one.groups) - 6} more" if len(one.groups) > 6 else "") or "any",
        ]
        for one in served[:_WORST]
    ]
    parts = []
    if tenants:
        parts.append(subsection(f"Tenants, {len(report.tenants):,} in all", table(["tenant", "attainment"], tenants)))
    if adapters:
        columns = ["adapter", "base", "requests", "attainment", "listed on"]
        parts.append(subsection(f"Adapters, {len(served):,} with requests", table(columns, adapters)))
    return section("Served worst", *parts) if parts else ""
