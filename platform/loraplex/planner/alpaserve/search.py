"""The search under AlpaServe's contract: many starts, fewer and longer runs of local search on the better ones.

One sequence of evaluations for a problem and a seed; a budget only says where it ends. Called by the command
``plan-alpaserve`` and by ``replan``.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain, repeat

import numpy as np

from loraplex.planner.alpaserve.anneal import anneal
from loraplex.planner.alpaserve.arrays import Counts
from loraplex.planner.alpaserve.baseline import greedy
from loraplex.planner.alpaserve.evaluation import Evaluation
from loraplex.planner.alpaserve.problem import Placement, Problem, to_groups
from loraplex.planner.alpaserve.proposals import MOVE_NAMES
from loraplex.planner.alpaserve.seeds import mixed_seeds, uniform
from loraplex.simulator.alpaserve import Group

_ODDS = {"add": 0.30, "remove": 0.15, "move": 0.20, "swap": 0.15, "reshape": 0.07, "split": 0.05, "merge": 0.05}
_ROUNDS = ((12, 0.25), (4, 0.3), (2, 0.4))
"""(Placements that go on, share of the usual evaluations that they have together); the last is repeated."""
_SLICE = 64
"""Evaluations between looks at the budget."""
_WORK = 120e6
"""Requests simulated when no number of evaluations is given."""
_MAX_EVALUATIONS = 20_000
_GREEDY_LAYOUTS = 3
"""The best layouts alone are also filled greedily ..."""
_MIXED_LAYOUTS = 3
"""... and tried in pairs."""
_WARMEST = 0.02
"""Temperature of the first evaluation, of the requests that are lost at the start ..."""
_COLDEST = 0.5
"""... and of the last, in requests."""
_HEADROOM_PACE = 0.85
"""By which the time between arrivals shrinks in each round after the last request is served."""
_HEADROOM_ROUNDS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    placement: Placement
    groups: tuple[Group, ...]
    """The same, sorted by their models, as the contract has it."""
    num_good: int
    """Of the requests of the problem that count."""
    evaluations: int
    """As a budget they give the same placement again."""
    gained: dict[str, int]
    """Requests that new bests brought, by kind of move."""


def default_evaluations(problem: Problem) -> int:
    """The same work for each problem, whatever the length of its trace."""
    return int(min(_MAX_EVALUATIONS, _WORK / len(problem.work.arrival_s)))


def plan(
    problem: Problem,
    *,
    evaluations: int | None = None,
    seed: int = 0,
    current: Placement | None = None,
    out_of_time: Callable[[], bool] = lambda: False,
) -> Found:
    """The best placement found for ``problem.work`` within ``evaluations``, or until ``out_of_time``. ``current``: one
    more start."""
    budget = default_evaluations(problem) if evaluations is None else evaluations
    search = _Search(problem, seed, budget, out_of_time)
    starts = _starts(problem, search, current)
    length = default_evaluations(problem)
    for keep, share in chain(_ROUNDS, repeat(_ROUNDS[-1])):
        starts = sorted(starts, key=lambda scored: -scored[0])[:keep]
        if search.is_over or starts[0][0] == search.num_counting:
            break
        starts = [search.improved(*start, int(length * share / len(starts))) for start in starts]
    score, placement = max(starts, key=lambda scored: scored[0])
    if score == search.num_counting:
        placement = _with_headroom(problem, placement, length, search)
    return Found(
        placement=placement,
        groups=to_groups(problem, placement),
        num_good=score,
        evaluations=search.evaluations,
        gained=dict(zip(MOVE_NAMES, search.gained.tolist(), strict=True)),
    )


def _starts(problem: Problem, search: "_Search", current: Placement | None) -> list[tuple[int, Placement]]:
    """(Score, placement): one at least, whatever the budget."""
    starts = [] if current is None else [search.scored(current)]
    alone = [search.scored(uniform(problem, layout)) for layout in range(len(problem.layouts))]
    order = sorted(range(len(alone)), key=lambda layout: -alone[layout][0])
    starts += alone
    for layout in order[:_GREEDY_LAYOUTS]:
        if not search.is_over:
            starts.append(search.scored(greedy(problem, layout, search)))
    for placement in mixed_seeds(problem, order[:_MIXED_LAYOUTS]):
        if not search.is_over:
            starts.append(search.scored(placement))
    return starts


def _with_headroom(problem: Problem, placement: Placement, length: int, search: "_Search") -> Placement:
    """Of the placements that serve every request the one that still does as arrivals come faster and faster."""
    for round_number in range(1, _HEADROOM_ROUNDS + 1):
        if search.is_over:
            break
        work = problem.work
        faster = problem.on(replace(work, arrival_s=work.arrival_s * _HEADROOM_PACE**round_number))
        harder = _Search(faster, search.seed + round_number, search.budget, search.out_of_time)
        harder.evaluations = search.evaluations
        _, better = harder.improved(*harder.scored(placement), length // (2 * _HEADROOM_ROUNDS))
        search.evaluations = harder.evaluations
        if search.scored(better)[0] < search.num_counting:
            break
        placement = better
    return placement


class _Search(Evaluation):
    """Runs of local search, each with a seed of its own, within a budget."""

    def __init__(self, problem: Problem, seed: int, budget: int, out_of_time: Callable[[], bool]) -> None:
        super().__init__(problem)
        self._odds = np.cumsum([_ODDS.get(name, 0.0) for name in MOVE_NAMES])
        self._odds /= self._odds[-1]
        self.seed = seed
        self.budget = budget
        self.out_of_time = out_of_time
        self.gained: Counts = np.zeros(len(MOVE_NAMES), dtype=np.int64)

    @property
    def is_over(self) -> bool:
        return self.evaluations >= self.budget or self.out_of_time()

    def scored(self, placement: Placement) -> tuple[int, Placement]:
        return int(self.good(placement).sum()), placement

    def improved(self, score: int, placement: Placement, length: int) -> tuple[int, Placement]:
        """A run of ``length`` evaluations from ``placement``, or as much of it as the budget leaves."""
        self.seed += 1
        if self.is_over:
            return score, placement
        now = Placement(placement.layout.copy(), placement.hosted.copy())
        best = Placement(placement.layout.copy(), placement.hosted.copy())
        good = self.good_by_chunk(now)
        temperatures = max(2.0, _WARMEST * (self.num_counting - score)), _COLDEST
        for first in range(0, length, _SLICE):
            if self.is_over or score == self.num_counting:
                break
            last = min(first + _SLICE, length, first + self.budget - self.evaluations)
            score, used = anneal(
                self.arrays,
                now.layout,
                now.hosted,
                good,
                best.layout,
                best.hosted,
                score,
                self.arrived,
                (first, last, length),
                temperatures,
                self._odds,
                self.seed * _SLICE + first // _SLICE,
                self.gained,
            )
            self.evaluations += used
        return int(score), best
