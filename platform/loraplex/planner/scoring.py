"""Scores choices by the fast simulator on one trace, each once, and each of their independent parts once.

Called by ``search``, ``pools`` and ``baselines``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from loraplex.core.ids import BaseModelId
from loraplex.core.plan import Plan
from loraplex.planner.capacity import Capacity
from loraplex.planner.migration import Move, move_between
from loraplex.planner.packing import Choice, Traffic, packed, to_plan
from loraplex.planner.parts import Divider
from loraplex.planner.problem import Kind, Problem, place
from loraplex.planner.sample import taken
from loraplex.simulator import fast
from loraplex.simulator.types import FloatArray, IntArray
from loraplex.simulator.workload import Workload
from loraplex.traces.arrivals import Arrivals

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    choice: Choice
    value: float
    """Attainment, less what starved tenants and the move from the current plan cost."""
    attainment: float
    lost: FloatArray
    """[A] requests of each adapter that missed a target."""
    busy: FloatArray
    """[G] share of the time that each group was busy."""


class _Outcome(NamedTuple):
    """Of a part of a choice, or of a whole plan."""

    good_of_adapter: FloatArray
    """[A + 1] requests within their targets; the last: of bases without an adapter."""
    good_of_tenant: FloatArray
    """[T + 1]; the last: of no tenant."""
    busy: FloatArray
    """[G]"""


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
        """Choices and plans scored, each once."""
        self.num_requests = len(arrivals)
        self.num_simulated = 0
        """Requests, those of a part that is known not again."""
        self._arrivals, self._workload = arrivals, Workload.of(arrivals, problem.adapters)
        self._divider = Divider(problem, arrivals)
        every = np.ones(len(arrivals), dtype=np.bool_)
        self._asked_of_adapter = _by(arrivals.adapter, every, len(arrivals.adapters))
        self._asked_of_tenant = _by(arrivals.tenant, every, len(arrivals.tenants))
        self._current, self._horizon_s = current, horizon_s
        self._known: dict[object, Scored | None] = {}
        self._known_parts: dict[object, _Outcome] = {}

    def score(self, choice: Choice) -> Scored | None:
        """None when the groups do not fit on the nodes; that costs no evaluation, nor does what is known."""
        key = choice.key()
        if key not in self._known:
            if place(self.problem.nodes, choice.groups) is None:
                self._known[key] = None
            else:
                self.evaluations += 1
                self._known[key] = self._scored(choice)
        return self._known[key]

    def score_plan(self, plan: Plan, choice: Choice) -> Scored:
        """The whole plan at once; ``choice`` is only handed on."""
        self.evaluations += 1
        return self._valued(choice, self._simulated(plan, self._workload), plan)

    def plan_of(self, choice: Choice) -> Plan:
        """Of a choice that fits on the nodes."""
        plan = to_plan(self.problem, self.traffic, self.capacity, choice)
        assert plan is not None
        return plan

    def move_to(self, plan: Plan) -> Move | None:
        """From the current plan, where there is one."""
        if self._current is None:
            return None
        return move_between(self.problem.costs, self.problem.size_of, self._current, plan)

    def _scored(self, choice: Choice) -> Scored:
        total = _Outcome(
            np.zeros_like(self._asked_of_adapter), np.zeros_like(self._asked_of_tenant), np.zeros(len(choice.groups))
        )
        for part in self._divider.parts(choice):
            outcome = self._outcome_of(part.choice)
            np.add(total.good_of_adapter, outcome.good_of_adapter, out=total.good_of_adapter)
            np.add(total.good_of_tenant, outcome.good_of_tenant, out=total.good_of_tenant)
            total.busy[list(part.groups)] = outcome.busy
        return self._valued(choice, total, None if self._current is None else self.plan_of(choice))

    def _outcome_of(self, part: Choice) -> _Outcome:
        key = part.key()
        if key not in self._known_parts:
            rows = self._divider.rows(part)
            if not len(rows):
                nothing = np.zeros_like(self._asked_of_adapter), np.zeros_like(self._asked_of_tenant)
                self._known_parts[key] = _Outcome(*nothing, np.zeros(len(part.groups)))
            else:
                arrivals = taken(self._arrivals, rows, self._arrivals.arrival_s[rows])
                # One table of names for all: what is known of its adapters is found out once.
                workload = replace(self._workload, arrivals=arrivals, request_base=self._workload.request_base[rows])
                alone = len(set(part.sets)) == 1 and len(set(part.groups)) == 1
                groups = packed(
                    self.problem,
                    self.traffic,
                    self.capacity,
                    Choice(groups=part.groups) if alone and not part.spread else part,
                    [()] * len(part.groups),
                )
                self._known_parts[key] = self._simulated(Plan(version=1, groups=groups), workload)
        return self._known_parts[key]

    def _simulated(self, plan: Plan, workload: Workload) -> _Outcome:
        arrivals = workload.arrivals
        self.num_simulated += len(arrivals)
        result = fast.simulate(self.problem.simulation(plan, arrivals), workload)
        return _Outcome(
            _by(arrivals.adapter, result.good, len(arrivals.adapters)),
            _by(arrivals.tenant, result.good, len(arrivals.tenants)),
            np.array([use.busy_s / max(result.end_s, 1e-9) for use in result.groups]),
        )

    def _valued(self, choice: Choice, outcome: _Outcome, plan: Plan | None) -> Scored:
        attainment = float(outcome.good_of_adapter.sum()) / len(self._arrivals)
        move = None if plan is None else self.move_to(plan)
        price = 0.0 if move is None else move.lost_gpu_s / (self.problem.num_gpus * self._horizon_s)
        return Scored(
            choice=choice,
            value=attainment - self._starved(outcome) - price,
            attainment=attainment,
            lost=(self._asked_of_adapter - outcome.good_of_adapter)[:-1],
            busy=outcome.busy,
        )

    def _starved(self, outcome: _Outcome) -> float:
        """How far tenants are under the floor, on average over all tenants."""
        asked = self._asked_of_tenant[:-1]
        if not self.problem.tenant_floor or not len(asked):
            return 0.0
        below = self.problem.tenant_floor * asked - outcome.good_of_tenant[:-1]
        return float((np.maximum(below, 0.0) / np.maximum(asked, 1.0)).sum() / len(asked))


def _by(index: IntArray, chosen: Mask, size: int) -> FloatArray:
    """[size + 1] how many of the chosen requests are of each; the last: of none (-1)."""
    return np.bincount(np.where(index < 0, size, index)[chosen], minlength=size + 1).astype(np.float64)
