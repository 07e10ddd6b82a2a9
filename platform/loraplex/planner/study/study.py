"""The planner against its baselines on two hours of LLM requests: attainment on both, and the GPUs that 99 % take.

Everything is simulated on the whole windows; searches and baselines see the planning window only. Called by
``__main__``.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loraplex.core.ids import BaseModelId
from loraplex.core.plan import Plan
from loraplex.cost.profile import CostProfile
from loraplex.engine import EngineConfig
from loraplex.planner.baselines import Baseline, baselines
from loraplex.planner.bound import attainment_bound, gpus_bound
from loraplex.planner.capacity import capacities, demands
from loraplex.planner.problem import Node, Problem, kinds
from loraplex.planner.search import Found, Search
from loraplex.planner.study.hours import Hours
from loraplex.simulator import fast
from loraplex.simulator.types import CostKey, ReplicaCost, Slo
from loraplex.simulator.workload import Workload
from loraplex.traces.arrivals import Arrivals

GPU = "h100-80gb"
GPUS_PER_NODE = 8
SLOS = {
    BaseModelId("llama3-8b"): Slo(ttft_s=0.5, tpot_s=0.05),
    BaseModelId("llama3-70b"): Slo(ttft_s=2.0, tpot_s=0.1),
}
SHARE = 0.99
"""Attainment that the table of GPUs asks for."""
BAND = (0.85, 0.95)
"""Where the best baseline's attainment on the planning window is to lie."""

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyRow:
    policy: str
    setting: str
    tried: int
    is_alpaserve: bool
    planning: float
    """Attainment."""
    following: float
    by_base: dict[str, float]
    """On the next window, of the bases that it asks for."""


def problem_of(hours: Hours, *, num_gpus: int) -> Problem:
    """``num_gpus`` H100 in nodes of eight, the last one smaller."""
    profile, engine = CostProfile.load(GPU), EngineConfig()
    bases = [BaseModelId(base) for base in hours.planning.base_models]
    keys = [CostKey(gpu=GPU, base_model_id=b, shape=shape) for b in bases for shape in profile.shapes(b, GPU)]
    return Problem(
        nodes=nodes(num_gpus),
        arrivals=hours.planning,
        adapters=hours.sizes,
        costs={key: ReplicaCost.of(profile, key, engine) for key in keys},
        slo=Slo(),
        slo_of_base={base: SLOS[base] for base in bases},
    )


def nodes(num_gpus: int) -> tuple[Node, ...]:
    sizes = [min(GPUS_PER_NODE, num_gpus - first) for first in range(0, num_gpus, GPUS_PER_NODE)]
    return tuple(Node(name=f"h100-{index}", gpu=GPU, num_gpus=size) for index, size in enumerate(sizes))


def planned(problem: Problem, *, budget_s: float, clock: Clock, seed: int = 0) -> tuple[Found, float]:
    """And the seconds that it took, the confirmation on the whole window included."""
    start_s = clock()
    found = Search(problem, evaluations=2**62, seed=seed, time_used=lambda: (clock() - start_s) / budget_s).run()
    return found, clock() - start_s


def scaled(
    build: Callable[[float], Problem], *, first: float, tuned: Callable[[Problem], Sequence[Baseline]] = baselines
) -> tuple[float, Problem, Sequence[Baseline]]:
    """The first scale tried, from ``first`` on, at which the best baseline lies in ``BAND``."""
    low, high, scale = 0.0, math.inf, first
    while True:
        problem = build(scale)
        compared = tuned(problem)
        workload = Workload.of(problem.arrivals, problem.adapters)
        best = max(attainment(problem, one.plan, workload) for one in compared)
        if BAND[0] <= best <= BAND[1]:
            return scale, problem, compared
        if best > BAND[1]:
            low = scale
        else:
            high = scale
        scale = math.sqrt(low * high) if low and high < math.inf else scale * (1.3 if best > BAND[1] else 1 / 1.3)


def attainment(problem: Problem, plan: Plan, workload: Workload) -> float:
    return fast.simulate(problem.simulation(plan, workload.arrivals), workload).score.attainment


def compared_rows(
    problem: Problem, found: Found, compared: Sequence[Baseline], following: Arrivals
) -> tuple[PolicyRow, ...]:
    """The plan first."""
    windows = [Workload.of(arrivals, problem.adapters) for arrivals in (problem.arrivals, following)]

    def row(policy: str, setting: str, tried: int, plan: Plan, is_alpaserve: bool) -> PolicyRow:
        after = fast.simulate(problem.simulation(plan, following), windows[1])
        return PolicyRow(
            policy=policy,
            setting=setting,
            tried=tried,
            is_alpaserve=is_alpaserve,
            planning=attainment(problem, plan, windows[0]),
            following=after.score.attainment,
            by_base={
                base: float(after.good[rows].mean())
                for index, base in enumerate(following.base_models)
                if (rows := following.base_model == index).any()
            },
        )

    return (
        row("loraplex", "", found.evaluations, found.plan, False),
        *(row(one.name, one.setting, one.tried, one.plan, one.is_alpaserve) for one in compared),
    )


def fewest_gpus(attained: Callable[[int], float], *, least: int, most: int) -> tuple[int | None, float]:
    """Fewest whole nodes' GPUs with an attainment of ``SHARE``, by bisection, and that attainment."""
    step = GPUS_PER_NODE
    low, high = least // step, most // step
    reached = attained(high * step)
    if reached < SHARE:
        return None, reached
    while high - low > 1:
        middle = (low + high) // 2
        value = attained(middle * step)
        if value >= SHARE:
            high, reached = middle, value
        else:
            low = middle
    return high * step, reached


def bounds(problem: Problem) -> tuple[float, float]:
    """(Attainment that no plan exceeds, GPUs that ``SHARE`` takes at least)."""
    capacity = capacities(problem, kinds(problem), demands(problem))
    return attainment_bound(problem, capacity), gpus_bound(problem, capacity, SHARE)
