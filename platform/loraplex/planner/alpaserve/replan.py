"""Planning again and again under drifting traffic, each move at its price; under AlpaServe's contract.

Every period a new placement is planned from the traffic of the period before, and taken only if it would have served
more of that traffic, the move included. A group that receives models serves nothing while their weights load; one
whose layout is new receives all of its models, after the groups that it is made of are idle. Called by the command
``plan-alpaserve``.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from loraplex.planner.alpaserve.baseline import alpaserve_search
from loraplex.planner.alpaserve.problem import Placement, Problem, from_groups, to_groups
from loraplex.planner.alpaserve.search import plan
from loraplex.simulator.alpaserve import Group, Mask, Seconds, Work, goodput, serve_from

LOAD_GIB_PER_S = 10.0
"""Of weights, to each GPU of a group at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replanned:
    start_s: tuple[float, ...]
    placements: tuple[tuple[Group, ...], ...]
    """``placements[k]`` from ``start_s[k]`` on."""
    goodput: float
    num_moves: int
    moved_gib: float
    """Weights loaded, per GPU, summed over groups and moves."""
    static_goodput: float
    """Of the first placement, kept."""
    alpaserve_goodput: float
    """Of what AlpaServe's search plans from the same first period, kept."""


def replan(problem: Problem, *, every_s: float, evaluations: int | None = None, seed: int = 0) -> Replanned:
    """The first period is served by a placement planned from its own traffic, as are the static ones."""
    work = problem.work
    first_s, last_s = float(work.arrival_s[0]), float(work.arrival_s[-1])
    starts = np.arange(first_s, last_s, every_s)
    parts = [work.between(start, end) for start, end in zip(starts, [*starts[1:], np.inf], strict=True)]
    state = _Cluster(problem, plan(problem.on(parts[0]), evaluations=evaluations, seed=seed).placement)
    static = _Cluster(problem, state.placement)
    alpaserve = _Cluster(problem, from_groups(problem, alpaserve_search(problem.on(parts[0]))))
    accepted, kept, theirs = [state.serve(parts[0])], [static.serve(parts[0])], [alpaserve.serve(parts[0])]
    placements, times, moved_gib = [to_groups(problem, state.placement)], [first_s], 0.0
    for index in range(1, len(parts)):
        start_s = float(starts[index])
        past = problem.on(parts[index - 1])
        if len(past.work.arrival_s):
            wanted = plan(past, evaluations=evaluations, seed=seed + index, current=state.placement).placement
            moved = state.rehearsal(wanted, float(starts[index - 1]))
            stayed = _Cluster(problem, state.placement)
            if np.count_nonzero(moved.serve(past.work)) > np.count_nonzero(stayed.serve(past.work)):
                moved_gib += state.move(wanted, start_s)
                placements.append(to_groups(problem, state.placement))
                times.append(start_s)
        accepted.append(state.serve(parts[index]))
        kept.append(static.serve(parts[index]))
        theirs.append(alpaserve.serve(parts[index]))
    return Replanned(
        start_s=tuple(times),
        placements=tuple(placements),
        goodput=goodput(work, np.concatenate(accepted)),
        num_moves=len(placements) - 1,
        moved_gib=moved_gib,
        static_goodput=goodput(work, np.concatenate(kept)),
        alpaserve_goodput=goodput(work, np.concatenate(theirs)),
    )


class _Cluster:
    """A placement and until when each stage of each group is busy."""

    def __init__(self, problem: Problem, placement: Placement) -> None:
        self._problem = problem
        self.placement = placement
        self._busy_s: Seconds = np.zeros((problem.num_devices, problem.stage_s.shape[2]))

    def rehearsal(self, wanted: Placement, at_s: float) -> "_Cluster":
        """A cluster idle until ``at_s`` that then moves from this placement to ``wanted``."""
        cluster = _Cluster(self._problem, self.placement)
        cluster.move(wanted, at_s)
        return cluster

    def move(self, wanted: Placement, at_s: float) -> float:
        """The GiB per GPU that are loaded, summed over groups; groups of one layout are paired to load the least."""
        problem, old = self._problem, self.placement
        size = problem.num_devices
        loads = np.zeros((size, size))
        for new in range(size):
            if wanted.layout[new] < 0:
                continue
            weights = np.where(wanted.hosted[new], problem.weight_gib[wanted.layout[new]], 0.0)
            for before in range(size):
                same = old.layout[before] == wanted.layout[new]
                loads[new, before] = weights[~old.hosted[before]].sum() if same else weights.sum()
        rows, columns = linear_sum_assignment(loads)
        pair = dict(zip(rows.tolist(), columns.tolist(), strict=True))
        used = [g for g in range(size) if wanted.layout[g] >= 0]
        staying = {g: pair[g] for g in used if old.layout[pair[g]] == wanted.layout[g]}
        dissolved = [g for g in range(size) if old.layout[g] >= 0 and g not in staying.values()]
        drained_s = max([at_s, *(float(self._busy_s[g].max()) for g in dissolved)])
        busy_s = np.zeros_like(self._busy_s)
        loaded_gib = 0.0
        for g in used:
            gib = float(loads[g, pair[g]])
            loaded_gib += gib
            if g in staying:
                busy_s[g] = self._busy_s[staying[g]]
                if gib > 0:
                    busy_s[g] = np.maximum(busy_s[g], at_s) + gib / LOAD_GIB_PER_S
            else:
                busy_s[g] = drained_s + gib / LOAD_GIB_PER_S
        self.placement, self._busy_s = wanted, busy_s
        return loaded_gib

    def serve(self, work: Work) -> Mask:
        """[R] which requests are accepted; goes on from where the last call ended."""
        problem, (layout, hosted) = self._problem, self.placement
        used = np.flatnonzero(layout >= 0)
        order = sorted(used.tolist(), key=lambda g: tuple(np.flatnonzero(hosted[g])))
        hosting = [[place for place, g in enumerate(order) if hosted[g, m]] for m in range(problem.num_models)]
        accepted: npt.NDArray[np.bool_] = np.zeros(len(work.arrival_s), dtype=np.bool_)
        clocks = self._busy_s[order]
        serve_from(
            clocks,
            work.arrival_s,
            work.model,
            work.slo_s,
            np.cumsum([0, *map(len, hosting)], dtype=np.int32),
            np.array([place for places in hosting for place in places], dtype=np.int32),
            problem.num_stages[layout[order]],
            problem.stage_s[layout[order]],
            accepted,
        )
        self._busy_s[order] = clocks
        return accepted
