"""Curves and timelines of a report, each a picture. Called by ``page`` and by notebooks."""

import math
from collections.abc import Sequence

import numpy as np

from loraplex.pages.heat_map import heat_map
from loraplex.pages.line_chart import Series, line_chart
from loraplex.planner.report.values import PlanReport, PolicyScore

MAX_HEAT_ROWS = 64


def slo_chart(report: PlanReport) -> str:
    """Attainment of every policy with all targets times a factor."""
    lines = [Series(name=one.policy, x=report.slo_scales, y=one.by_slo) for one in report.policies]
    return line_chart(lines, x_label="SLO scale", y_label="attainment", y_high=1.0, x_log=True)


def rate_chart(report: PlanReport) -> str:
    """Attainment of every policy with the requests coming faster or slower; needs ``rate_factors``."""
    lines = [Series(name=one.policy, x=report.rate_factors, y=one.by_rate) for one in report.policies]
    low = floor_of([one.y for one in lines])
    return line_chart(lines, x_label="rate factor", y_label="attainment", y_low=low, y_high=1.0)


def timeline_chart(report: PlanReport) -> str:
    """Attainment over time of the plan, the best of AlpaServe's plans and the best of all others."""
    lines = [
        Series(name=one.policy, x=_middles_s(report), y=one.timeline)
        for one in (report.policies[0], *_best_others(report))
    ]
    low = floor_of([one.y for one in lines])
    return line_chart(lines, x_label="seconds", y_label="attainment", y_low=low, y_high=1.0, dots=False)


def rate_over_time(report: PlanReport) -> str:
    rate = Series(name="requests/s", x=_middles_s(report), y=report.requests_per_s)
    return line_chart([rate], x_label="seconds", y_label="requests/s", dots=False, height=160)


def load_over_time(report: PlanReport) -> str:
    """Requests in each group, waiting and running; of more than ``MAX_HEAT_ROWS`` groups the busiest."""
    load, middles_s = np.array(report.in_flight), _middles_s(report)
    rows = list(range(len(load)))
    if len(rows) > MAX_HEAT_ROWS:
        rows = sorted(sorted(rows, key=lambda row: -float(load[row].sum()))[:MAX_HEAT_ROWS])
    names = [f"{g.name}  {'+'.join(str(b.base_model_id) for b in g.bases)}" for g in report.plan.groups]
    return heat_map(
        [names[row] for row in rows],
        load[rows],
        x_label="seconds",
        x_range=(report.timeline_s[0], report.timeline_s[-1] + _step_s(report)),
        tip=lambda row, column: (
            f"{report.plan.groups[rows[row]].name}, {middles_s[column]:,.0f} s: {load[rows[row], column]:.1f} requests"
        ),
    )


def floor_of(lines: Sequence[Sequence[float]]) -> float:
    """Where an axis of shares begins: a round number below all; 0 where much of the range is used."""
    least = min((value for one in lines for value in one if math.isfinite(value)), default=0.0)
    return 0.0 if least < 0.5 else math.floor(least * 20 - 1e-9) / 20


def ceiling_of(values: Sequence[float]) -> float:
    return min(1.0, math.ceil(max(values) * 20 + 1e-9) / 20)


def _step_s(report: PlanReport) -> float:
    return report.timeline_s[1] - report.timeline_s[0]


def _middles_s(report: PlanReport) -> list[float]:
    return [start_s + _step_s(report) / 2 for start_s in report.timeline_s]


def _best_others(report: PlanReport) -> list[PolicyScore]:
    found = []
    for is_alpaserve in (True, False):
        some = [one for one in report.policies[1:] if one.is_alpaserve is is_alpaserve]
        found += sorted(some, key=lambda one: -one.score.attainment)[:1]
    return found
