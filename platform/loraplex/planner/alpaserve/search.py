"""The search under AlpaServe's contract: many starts, fewer and longer runs of local search on the better ones.

Deterministic for a seed and a number of evaluations. Called by the command ``plan-alpaserve`` and by ``replan``.
"""

from dataclasses import dataclass, replace

import numpy as np

from loraplex.planner.alpaserve import anneal as moves
from loraplex.planner.alpaserve.anneal import Counts
from loraplex.planner.alpaserve.baseline import greedy
from loraplex.planner.alpaserve.evaluation import Evaluation
from loraplex.planner.alpaserve.problem import Placement, Problem, to_groups
from loraplex.planner.alpaserve.seeds import mixed_seeds
from loraplex.simulator.alpaserve import Group

_ODDS = {"add": 0.30, "remove": 0.15, "move": 0.20, "swap": 0.15, "reshape": 0.07, "split": 0.05, "merge": 0.05}
_ROUNDS = ((12, 0.3), (4, 0.3), (2, 0.4))
"""(Placements that go on, share of the evaluations)."""
_WORK = 120e6
"""Requests simulated when no number of evaluations is given."""
_MAX_EVALUATIONS = 20_000
_MIXED_LAYOUTS = 4
"""The best layouts alone are also tried in pairs."""
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
    gained: dict[str, int]
    """Requests that new bests brought, by kind of move."""


def default_evaluations(problem: Problem) -> int:
    """The same work for each problem, whatever the length of its trace."""
    return int(min(_MAX_EVALUATIONS, _WORK / len(problem.work.arrival_s)))


def plan(problem: Problem, *, evaluations: int | None = None, seed: int = 0, current: Placement | None = None) -> Found:
    """The best placement found for ``problem.work``. ``current``: one more start."""
    budget = default_evaluations(problem) if evaluations is None else evaluations
    search = _Search(problem, seed)
    starts = [search.scored(greedy(problem, layout, search)) for layout in range(len(problem.layouts))]
    best_layouts = sorted(range(len(starts)), key=lambda index: (-starts[index][0], index))[:_MIXED_LAYOUTS]
    for placement in mixed_seeds(problem, best_layouts):
        if search.evaluations < budget:
            starts.append(search.scored(placement))
    if current is not None:
        starts.append(search.scored(current))
    left = max(0, budget - search.evaluations)
    for keep, share in _ROUNDS:
        starts = sorted(starts, key=lambda scored: -scored[0])[:keep]
        if starts[0][0] == search.num_counting:
            break
        starts = [search.improved(score, placement, int(left * share / len(starts))) for score, placement in starts]
    score, placement = max(starts, key=lambda scored: scored[0])
    if score == search.num_counting:
        placement = _with_headroom(problem, placement, max(0, budget - search.evaluations), search)
    return Found(
        placement=placement,
        groups=to_groups(problem, placement),
        num_good=score,
        evaluations=search.evaluations,
        gained=dict(zip(moves.MOVE_NAMES, search.gained.tolist(), strict=True)),
    )


def _with_headroom(problem: Problem, placement: Placement, evaluations: int, search: "_Search") -> Placement:
    """Of the placements that serve every request the one that still does as arrivals come faster and faster."""
    share = evaluations // _HEADROOM_ROUNDS
    for round_number in range(1, _HEADROOM_ROUNDS + 1):
        work = problem.work
        faster = replace(work, arrival_s=work.arrival_s * _HEADROOM_PACE**round_number)
        harder = _Search(problem.on(faster), search.seed + round_number)
        _, better = harder.improved(*harder.scored(placement), share)
        search.evaluations += harder.evaluations
        if search.scored(better)[0] < search.num_counting:
            break
        placement = better
    return placement


class _Search(Evaluation):
    """Each start has a seed of its own."""

    def __init__(self, problem: Problem, seed: int) -> None:
        super().__init__(problem)
        self._odds = np.cumsum([_ODDS.get(name, 0.0) for name in moves.MOVE_NAMES])
        self._odds /= self._odds[-1]
        self.seed = seed
        self.gained: Counts = np.zeros(len(moves.MOVE_NAMES), dtype=np.int64)

    def scored(self, placement: Placement) -> tuple[int, Placement]:
        return int(self.good(placement).sum()), placement

    def improved(self, score: int, placement: Placement, evaluations: int) -> tuple[int, Placement]:
        if evaluations < 2:
            return score, placement
        self.seed += 1
        warmest = max(2.0, _WARMEST * (self.num_counting - score))
        layout, hosted = placement.layout.copy(), placement.hosted.copy()
        best, used = moves.anneal(
            self.arrays,
            layout,
            hosted,
            self.arrived,
            evaluations,
            warmest,
            _COLDEST,
            self._odds,
            self.seed,
            self.gained,
        )
        self.evaluations += used
        return int(best), Placement(layout, hosted)
