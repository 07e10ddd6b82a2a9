"""The search for an LLM cluster's plan: groups of mixed shapes, bases on groups, adapters on replicas.

Finds a shape and a number of GPUs for each base by simulating each alone on a shorter trace (``pools``), improves the
best by moves accepted as in simulated annealing (``moves``), and confirms the leaders on the whole trace. One sequence
for a problem and a seed: a budget of evaluations or time only says where it ends. Called by the command ``plan``.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import exp

from loraplex.core.ids import BaseModelId
from loraplex.core.plan import Plan
from loraplex.planner.bound import attainment_bound
from loraplex.planner.capacity import Demand, capacities, demands
from loraplex.planner.migration import Move
from loraplex.planner.moves import Moves
from loraplex.planner.packing import Choice, Traffic
from loraplex.planner.pools import Pools
from loraplex.planner.problem import Kind, Problem, kinds
from loraplex.planner.sample import MAX_REQUESTS, sampled
from loraplex.planner.scoring import Scored, Scorer
from loraplex.planner.starts import Capacities, best_kinds, mixtures
from loraplex.traces.arrivals import Arrivals

_WARMEST, _COLDEST, _COOLING = 0.004, 0.0002, 300
_LEADERS = 6
_IDLE = 2000
"""Proposals in a row that bring nothing new, after which the search ends."""
_CONFIRMATION = 1.3
"""A request of the whole trace costs at most so many times what one of the shorter costs."""
_FIRST, _FIRST_SHARE = 12, 0.4
"""Evaluations before the pace counts, which the overload of a poor first choice slows down, if they take no more than
this share of the time."""
HYSTERESIS = 0.005
"""Attainment by which a plan must beat the current one, its move paid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A new best."""

    evaluation: int
    value: float
    attainment: float
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    plan: Plan
    choice: Choice
    attainment: float
    """On the whole planning trace."""
    sample_attainment: float
    bound: float
    evaluations: int
    """As a budget they give the same plan again."""
    steps: tuple[Step, ...]
    reasons: tuple[str, ...]
    """Why each kind of group has its shape, a line each."""
    move: Move | None
    """From the current plan, where one was given."""
    kept: bool
    """The current plan stays: nothing beat it by more than the move costs and the hysteresis."""


@dataclass(slots=True)
class Search:
    """``evaluations``: choices scored on the shorter trace; the confirmation is not counted."""

    problem: Problem
    evaluations: int = 400
    seed: int = 0
    current: Plan | None = None
    out_of_time: Callable[[], bool] = lambda: False
    time_used: Callable[[], float] = lambda: 0.0
    """Share of the time for search and confirmation together that is gone; the search ends early enough for both."""
    progress: Callable[[int, float], None] = lambda evaluations, attainment: None
    only_kinds: Callable[[Kind], bool] = lambda kind: True
    """Restricts what groups may be, for baselines."""
    max_sample: int = MAX_REQUESTS
    steps: list[Step] = field(default_factory=list, init=False)
    _leaders: list[Scored] = field(default_factory=list, init=False)
    _used_before: float = field(default=0.0, init=False)

    def run(self) -> Found:
        """InvalidInput naming a base that fits nowhere, a target that nothing meets, or a wrong row of the trace."""
        problem = self.problem
        demand = demands(problem)
        allowed = tuple(kind for kind in kinds(problem) if self.only_kinds(kind))
        capacity = capacities(problem, allowed, demand)
        bound = attainment_bound(problem, capacity)
        sample = sampled(problem.arrivals, self.max_sample)
        scorer = Scorer(problem, Traffic.of(problem), capacity, sample, current=self.current)
        self._used_before = self.time_used()
        self._explore(scorer, demand)
        self._improve(scorer, demand)
        evaluations = scorer.evaluations
        best, plan, kept = self._confirmed(scorer, sample)
        return Found(
            plan=plan,
            choice=best.choice,
            attainment=best.attainment,
            sample_attainment=self._leaders[0].attainment,
            bound=bound,
            evaluations=evaluations,
            steps=tuple(self.steps),
            reasons=tuple(_reasons(problem, capacity, best)),
            move=scorer.move_to(plan),
            kept=kept,
        )

    def warm_up(self) -> None:
        """Simulates a few requests once, so that what is compiled is compiled. Errors as ``run``."""
        problem = self.problem
        demand = demands(problem)
        capacity = capacities(problem, kinds(problem), demand)
        few = sampled(problem.arrivals, 100)
        scorer = Scorer(problem, Traffic.of(problem), capacity, few)
        for groups in mixtures(problem, capacity, demand):
            if scorer.score(Choice(groups=groups)) is not None:
                return

    def _explore(self, scorer: Scorer, demand: Mapping[BaseModelId, Demand]) -> None:
        """One choice at least, whatever the budget."""

        def attempt(choice: Choice, what: str) -> Scored | None:
            return self._try(scorer, choice, what)

        found = Pools(scorer, demand, attempt, lambda: bool(self._leaders) and self._over(scorer)).explore()
        for groups in mixtures(self.problem, scorer.capacity, demand):
            if found:
                break
            found = attempt(Choice(groups=groups), "mixture") is not None

    def _improve(self, scorer: Scorer, demand: Mapping[BaseModelId, Demand]) -> None:
        moves = Moves(scorer, demand, self.seed)
        draw = random.Random(self.seed)
        here = self._leaders[0]
        idle = step = 0
        while idle < _IDLE and not self._over(scorer):
            made = moves.neighbour(here)
            before = scorer.evaluations
            scored = None if made is None else self._try(scorer, *made)
            # What is known costs nothing: many of those in a row mean that nothing new is near.
            idle = idle + 1 if scorer.evaluations == before else 0
            if scored is None:
                continue
            step += scorer.evaluations - before
            temperature = _WARMEST * (_COLDEST / _WARMEST) ** ((step % _COOLING) / _COOLING)
            if scored.value >= here.value or draw.random() < exp((scored.value - here.value) / temperature):
                here = scored
            if step and step % _COOLING == 0:
                here = self._leaders[0]

    def _try(self, scorer: Scorer, choice: Choice, what: str) -> Scored | None:
        before = scorer.evaluations
        scored = scorer.score(choice)
        if scored is None or scorer.evaluations == before:
            return scored
        leaders = self._leaders
        if not leaders or scored.value > leaders[0].value:
            self.steps.append(
                Step(evaluation=scorer.evaluations, value=scored.value, attainment=scored.attainment, what=what)
            )
        # One of each mixture of groups, half of them without adapter sets: what the shorter trace cannot tell apart or
        # flatters, the whole one may not.
        alike = next((i for i, one in enumerate(leaders) if _mixture(one.choice) == _mixture(choice)), None)
        if alike is None:
            leaders.append(scored)
        elif leaders[alike].value < scored.value:
            leaders[alike] = scored
        leaders.sort(key=lambda one: -one.value)
        family = [i for i, one in enumerate(leaders) if _mixture(one.choice)[0] == _mixture(choice)[0]]
        for index in reversed(family[_LEADERS // 2 :]):
            del leaders[index]
        self.progress(scorer.evaluations, leaders[0].attainment)
        return scored

    def _over(self, scorer: Scorer) -> bool:
        if scorer.evaluations >= self.evaluations or self.out_of_time():
            return True
        used = self.time_used()
        if scorer.evaluations < _FIRST and used < _FIRST_SHARE:
            return False
        whole = len(self.problem.arrivals)
        # Leaders share parts, which are simulated once.
        left = (_LEADERS / 2 * (whole != scorer.num_requests) + 1 + (self.current is not None)) * whole
        of_request = (used - self._used_before) / max(scorer.num_simulated, 1)
        return used + _CONFIRMATION * of_request * left >= 1

    def _confirmed(self, scorer: Scorer, sample: Arrivals) -> tuple[Scored, Plan, bool]:
        """The best on the whole trace, its plan, and whether that is the current one."""
        problem = self.problem
        whole = scorer
        if sample is not problem.arrivals:
            whole = Scorer(problem, scorer.traffic, scorer.capacity, problem.arrivals, current=self.current)
        seen = [scored for one in self._leaders if (scored := whole.score(one.choice)) is not None]
        choice = max(seen, key=lambda scored: scored.value).choice
        plan = whole.plan_of(choice)
        best = whole.score_plan(plan, choice)
        if self.current is not None:
            stay = whole.score_plan(self.current, Choice(groups=()))
            if best.value <= stay.value + HYSTERESIS:
                return stay, self.current, True
        return best, plan, False


def _mixture(choice: Choice) -> tuple[bool, list[str]]:
    return any(one is not None for one in choice.sets) or bool(choice.spread), sorted(map(str, choice.groups))


def _reasons(problem: Problem, capacity: Capacities, best: Scored) -> list[str]:
    lines = []
    for kind in dict.fromkeys(best.choice.groups):
        count = best.choice.groups.count(kind)
        for base in kind.bases:
            one = capacity[kind, base]
            rivals = [other for other in best_kinds(problem, capacity, base) if other.shape != kind.shape]
            line = (
                f"{count} x {kind}: {one.requests_per_s / kind.shape.num_ranks:.2f} requests/s of {base} per GPU in "
                f"batches of {one.batch} within its targets"
            )
            if rivals:
                other = rivals[0]
                rate = capacity[other, base].requests_per_s / other.shape.num_ranks
                line += f"; the next best alone, tp{other.shape.tp} pp{other.shape.pp}, {rate:.2f}"
            lines.append(line)
    return lines
