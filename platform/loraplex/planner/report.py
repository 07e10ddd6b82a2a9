"""All that a report of a plan shows, as values: the plan, its score, what it is compared with, how the search went.

Made by ``reported``; drawn by the command ``plan`` (a table) and by the HTML report.
"""

from dataclasses import dataclass

import numpy as np

from loraplex.core.plan import Plan
from loraplex.planner.baselines import Baseline
from loraplex.planner.bound import gpus_bound
from loraplex.planner.capacity import capacities, demands
from loraplex.planner.problem import Problem, kinds
from loraplex.planner.search import Found
from loraplex.simulator import fast
from loraplex.simulator.types import GroupUse, Score
from loraplex.simulator.workload import Workload
from loraplex.traces.arrivals import Arrivals


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyScore:
    policy: str
    setting: str
    planned: float
    """Attainment on the trace that it was tuned on (its sample)."""
    score: Score
    """On the trace that is scored."""
    is_alpaserve: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    plan: Plan
    found: Found
    score: Score
    """Of the plan on the trace that is scored: the planning trace, or another window."""
    groups: tuple[GroupUse, ...]
    tenants: dict[str, float]
    """Attainment, worst first."""
    policies: tuple[PolicyScore, ...]
    """The plan itself first, then the baselines."""
    gpus_bound: float
    """Fewest GPUs that could serve 99 % of the planning trace, by the linear programme."""
    timeline_s: tuple[float, ...]
    """Starts of equal parts of the scored trace ..."""
    timeline_attainment: tuple[float, ...]
    """... and the attainment in each; NaN where nothing arrived."""


def reported(
    problem: Problem, found: Found, compared: tuple[Baseline, ...], scored_on: Arrivals | None = None, parts: int = 60
) -> PlanReport:
    """``scored_on``: another window with the same tables of names; None: the planning trace."""
    arrivals = problem.arrivals if scored_on is None else scored_on
    workload = Workload.of(arrivals, problem.adapters)
    result = fast.simulate(problem.simulation(found.plan, arrivals), workload)
    policies = [
        PolicyScore(
            policy="loraplex", setting="", planned=found.sample_attainment, score=result.score, is_alpaserve=False
        )
    ]
    for baseline in compared:
        other = fast.simulate(problem.simulation(baseline.plan, arrivals), workload)
        policies.append(
            PolicyScore(
                policy=baseline.name,
                setting=baseline.setting,
                planned=baseline.attainment,
                score=other.score,
                is_alpaserve=baseline.is_alpaserve,
            )
        )
    span_s = max(float(arrivals.arrival_s[-1] - arrivals.arrival_s[0]), 1e-9)
    part = np.minimum(((arrivals.arrival_s - arrivals.arrival_s[0]) / span_s * parts).astype(np.int64), parts - 1)
    counts = np.bincount(part, minlength=parts)
    good = np.bincount(part, weights=result.good.astype(np.float64), minlength=parts)
    attainments = np.where(counts > 0, good / np.maximum(counts, 1), np.nan)
    worst = [(name, float(value)) for name, value in zip(arrivals.tenants, result.tenant_attainment, strict=True)]
    capacity = capacities(problem, kinds(problem), demands(problem))
    return PlanReport(
        plan=found.plan,
        found=found,
        score=result.score,
        groups=result.groups,
        tenants=dict(sorted((pair for pair in worst if not np.isnan(pair[1])), key=lambda pair: pair[1])),
        policies=tuple(policies),
        gpus_bound=gpus_bound(problem, capacity, 0.99),
        timeline_s=tuple((float(arrivals.arrival_s[0]) + np.arange(parts) * span_s / parts).tolist()),
        timeline_attainment=tuple(attainments.tolist()),
    )
