"""The search for an LLM cluster's plan: groups of mixed shapes, bases on groups, adapters on replicas.

Starts from mixtures that the cost model likes, scores on a shorter trace by the fast simulator, improves the best by
moves accepted as in simulated annealing, and confirms the leaders on the whole trace. One sequence for a problem and a
seed: a budget of evaluations or time only says where it ends. Called by the command ``plan``.
"""

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import exp

import numpy as np

from loraplex.core.ids import BaseModelId
from loraplex.core.plan import Plan
from loraplex.planner.bound import attainment_bound
from loraplex.planner.capacity import Demand, capacities, demands
from loraplex.planner.migration import Move, move_between
from loraplex.planner.packing import EVERYWHERE, Choice, Traffic
from loraplex.planner.problem import Kind, Problem, kinds
from loraplex.planner.sample import sampled
from loraplex.planner.scoring import Scored, Scorer
from loraplex.planner.starts import Capacities, best_kinds, filled, mixtures
from loraplex.traces.arrivals import Arrivals

SPREADS = (EVERYWHERE, 1.0, 2.0, 4.0, 8.0)
_WARMEST, _COLDEST, _COOLING = 0.004, 0.0002, 300
_LEADERS = 3
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
    """``evaluations``: simulations of the shorter trace; the confirmation is not counted."""

    problem: Problem
    evaluations: int = 400
    seed: int = 0
    current: Plan | None = None
    out_of_time: Callable[[], bool] = lambda: False
    progress: Callable[[int, float], None] = lambda evaluations, attainment: None
    only_kinds: Callable[[Kind], bool] = lambda kind: True
    """Restricts what groups may be, for baselines."""
    max_sample: int = 40_000
    steps: list[Step] = field(default_factory=list, init=False)

    def run(self) -> Found:
        """InvalidInput naming a base that fits nowhere, a target that nothing meets, or a wrong row of the trace."""
        problem = self.problem
        demand = demands(problem)
        allowed = tuple(kind for kind in kinds(problem) if self.only_kinds(kind))
        capacity = capacities(problem, allowed, demand)
        sample = sampled(problem.arrivals, self.max_sample)
        scorer = Scorer(problem, Traffic.of(problem), capacity, sample, current=self.current)
        leaders: list[Scored] = []
        self._improve(scorer, leaders, mixtures(problem, capacity, demand), demand)
        evaluations = scorer.evaluations
        best, kept = self._confirmed(scorer, leaders, sample)
        return Found(
            plan=best.plan,
            choice=best.choice,
            attainment=best.attainment,
            sample_attainment=leaders[0].attainment,
            bound=attainment_bound(problem, capacity),
            evaluations=evaluations,
            steps=tuple(self.steps),
            reasons=tuple(_reasons(problem, capacity, best)),
            move=None
            if self.current is None
            else move_between(problem.costs, problem.size_of, self.current, best.plan),
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

    def _improve(
        self,
        scorer: Scorer,
        leaders: list[Scored],
        starts: Iterable[tuple[Kind, ...]],
        demand: Mapping[BaseModelId, Demand],
    ) -> None:
        draw = random.Random(self.seed)
        for groups in starts:
            self._try(scorer, leaders, Choice(groups=groups), "start")
            if leaders and self._over(scorer):
                break
        for base in self.problem.bases:
            for spread in SPREADS[1:]:
                if leaders and not self._over(scorer):
                    now = leaders[0].choice
                    other = replace(now, spread={**now.spread, base: spread})
                    self._try(scorer, leaders, other, f"spread {spread:g} of {base}")
        here = leaders[0]
        idle = step = 0
        while not self._over(scorer) and idle < 2000:
            made = _moved(draw, self.problem, scorer, demand, here)
            before = scorer.evaluations
            scored = None if made is None else self._try(scorer, leaders, *made)
            # What is known costs nothing: many of those in a row mean that nothing new is near.
            idle = idle + 1 if scorer.evaluations == before else 0
            if scored is None:
                continue
            step += scorer.evaluations - before
            temperature = _WARMEST * (_COLDEST / _WARMEST) ** ((step % _COOLING) / _COOLING)
            if scored.value >= here.value or draw.random() < exp((scored.value - here.value) / temperature):
                here = scored
            if step and step % _COOLING == 0:
                here = leaders[0]

    def _try(self, scorer: Scorer, leaders: list[Scored], choice: Choice, what: str) -> Scored | None:
        before = scorer.evaluations
        scored = scorer.score(choice)
        if scored is None or scorer.evaluations == before:
            return scored
        if not leaders or scored.value > leaders[0].value:
            self.steps.append(
                Step(evaluation=scorer.evaluations, value=scored.value, attainment=scored.attainment, what=what)
            )
        leaders.append(scored)
        leaders.sort(key=lambda one: -one.value)
        del leaders[_LEADERS:]
        self.progress(scorer.evaluations, leaders[0].attainment)
        return scored

    def _over(self, scorer: Scorer) -> bool:
        return scorer.evaluations >= self.evaluations or self.out_of_time()

    def _confirmed(self, scorer: Scorer, leaders: list[Scored], sample: Arrivals) -> tuple[Scored, bool]:
        """The best on the whole trace, and whether it is the current plan."""
        problem = self.problem
        whole = scorer
        seen = leaders
        if sample is not problem.arrivals:
            whole = Scorer(problem, scorer.traffic, scorer.capacity, problem.arrivals, current=self.current)
            seen = [whole.score_plan(one.plan, one.choice) for one in leaders]
        best = max(seen, key=lambda one: one.value)
        if self.current is not None:
            stay = whole.score_plan(self.current, Choice(groups=()))
            if best.value <= stay.value + HYSTERESIS:
                return stay, True
        return best, False


def _moved(
    draw: random.Random, problem: Problem, scorer: Scorer, demand: Mapping[BaseModelId, Demand], now: Scored
) -> tuple[Choice, str] | None:
    """A neighbour of ``now`` and what was done; None when the move that was drawn is not possible."""
    choice = now.choice
    kind = draw.choices(("groups", "spread", "more", "fewer"), weights=(8, 1, 1, 1))[0]
    if kind == "groups":
        return _exchanged(draw, problem, scorer, demand, now)
    base = draw.choice(problem.bases)
    if kind == "spread":
        spread = draw.choice(SPREADS)
        return replace(choice, spread={**choice.spread, base: spread}), f"spread {spread:g} of {base}"
    weights = now.lost + 0.01 if kind == "more" else scorer.traffic.requests_per_s + 1e-6
    if not len(weights):
        return None
    adapter = draw.choices(range(len(weights)), weights=weights.tolist())[0]
    extra = {**choice.extra, adapter: choice.extra.get(adapter, 0) + (1 if kind == "more" else -1)}
    return replace(choice, extra=extra), f"{kind} groups for adapter {problem.arrivals.adapters[adapter].name}"


def _exchanged(
    draw: random.Random, problem: Problem, scorer: Scorer, demand: Mapping[BaseModelId, Demand], now: Scored
) -> tuple[Choice, str] | None:
    """Some groups become one or more of another kind: another shape, another base, a base more or less."""
    able = [kind for kind in scorer.kinds if any(scorer.capacity[kind, base].requests_per_s > 0 for base in kind.bases)]
    target = draw.choice(able)
    goal = target.shape.num_ranks * draw.choice((1, 1, 2, 4))
    groups = now.choice.groups
    # Groups that have least to do make room first, more often than not.
    order: list[int] = np.argsort(now.busy + np.array([draw.random() * 0.5 for _ in groups])).tolist()
    freed, gone = 0, set()
    for index in order:
        if freed < goal and groups[index].gpu == target.gpu and groups[index] != target:
            gone.add(index)
            freed += groups[index].shape.num_ranks
    if freed < target.shape.num_ranks:
        return None
    kept = [group for index, group in enumerate(groups) if index not in gone]
    kept += [target] * (freed // target.shape.num_ranks)
    served = {base for group in kept for base in group.bases}
    if any(demand[base].requests_per_s > 0 and base not in served for base in problem.bases):
        return None
    first = {base: ranked[0] for base in problem.bases if (ranked := best_kinds(problem, scorer.capacity, base))}
    made = filled(problem, scorer.capacity, demand, first, tuple(kept))
    return replace(now.choice, groups=made), f"{len(gone)} groups become {freed // target.shape.num_ranks} x {target}"


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
