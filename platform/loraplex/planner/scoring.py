"""Scores choices by the fast simulator on one trace, each once. Called by ``search`` and ``baselines``."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from loraplex.core.ids import BaseModelId
from loraplex.core.plan import Plan
from loraplex.planner.capacity import Capacity
from loraplex.planner.migration import Move, move_between
from loraplex.planner.packing import Choice, Traffic, to_plan
from loraplex.planner.problem import Kind, Problem
from loraplex.simulator import fast
from loraplex.simulator.types import FloatArray, SimulationResult
from loraplex.simulator.workload import Workload
from loraplex.traces.arrivals import Arrivals


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    choice: Choice
    plan: Plan
    value: float
    """Attainment, less what starved tenants and the move from the current plan cost."""
    attainment: float
    lost: FloatArray
    """[A] requests of each adapter that missed a target."""
    busy: FloatArray
    """[G] share of the time that each group was busy."""
    move: Move | None


class Scorer:
    """``arrivals`` may be a part of the problem's trace."""

    def __init__(
        self,
        problem: Problem,
        traffic: Traffic,
        capacity: Mapping[tuple[Kind, BaseModelId], Capacity],
        arrivals: Arrivals,
        *,
        current: Plan | None = None,
        horizon_s: float = 3600.0,
    ) -> None:
        self.problem, self.traffic, self.capacity = problem, traffic, capacity
        self.kinds = tuple(dict.fromkeys(kind for kind, _ in capacity))
        self.evaluations = 0
        self._arrivals, self._workload = arrivals, Workload.of(arrivals, problem.adapters)
        self._current, self._horizon_s = current, horizon_s
        self._known: dict[object, Scored | None] = {}

    def score(self, choice: Choice) -> Scored | None:
        """None when the groups do not fit on the nodes; that costs no evaluation, nor does what is known."""
        key = (choice.groups, tuple(sorted(choice.spread.items())), tuple(sorted(choice.extra.items())))
        if key not in self._known:
            plan = to_plan(self.problem, self.traffic, self.capacity, choice)
            self._known[key] = None if plan is None else self.score_plan(plan, choice)
        return self._known[key]

    def score_plan(self, plan: Plan, choice: Choice) -> Scored:
        self.evaluations += 1
        result = fast.simulate(self.problem.simulation(plan, self._arrivals), self._workload)
        chosen = (self._arrivals.adapter >= 0) & ~result.good
        lost = np.bincount(self._arrivals.adapter[chosen], minlength=len(self.problem.adapters)).astype(np.float64)
        move = (
            None
            if self._current is None
            else move_between(self.problem.costs, self.problem.size_of, self._current, plan)
        )
        price = 0.0 if move is None else move.lost_gpu_s / (self.problem.num_gpus * self._horizon_s)
        return Scored(
            choice=choice,
            plan=plan,
            value=result.score.attainment - self._starved(result) - price,
            attainment=result.score.attainment,
            lost=lost,
            busy=np.array([use.busy_s / max(result.end_s, 1e-9) for use in result.groups]),
            move=move,
        )

    def _starved(self, result: SimulationResult) -> float:
        """How far tenants are under the floor, on average over all tenants."""
        if not self.problem.tenant_floor or not len(result.tenant_attainment):
            return 0.0
        below = self.problem.tenant_floor - result.tenant_attainment
        return float(np.nansum(np.maximum(below, 0.0)) / len(below))
