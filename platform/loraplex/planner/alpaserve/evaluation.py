"""A problem handed to compiled code, and placements scored there. Called by ``search``, ``baseline`` and ``replan``."""

import numpy as np

from loraplex.planner.alpaserve.arrays import Arrays, Counts
from loraplex.planner.alpaserve.counting import CHUNKS, count_good
from loraplex.planner.alpaserve.problem import Placement, Problem


class Evaluation:
    """Counts how many placements it has scored."""

    def __init__(self, problem: Problem) -> None:
        scored = problem.work.scored()
        self.arrays = Arrays(
            problem.work.arrival_s,
            problem.work.model,
            problem.work.slo_s,
            scored.start,
            scored.stop,
            problem.num_gpus,
            problem.num_stages,
            problem.stage_s,
            problem.weight_gib,
            problem.memory_gib,
        )
        self.arrived: Counts = np.bincount(problem.work.model[scored], minlength=problem.num_models).astype(np.int64)
        """[M] requests that count."""
        self.num_counting = int(self.arrived.sum())
        self.evaluations = 0
        self._everything = np.ones(problem.num_models, dtype=np.bool_)

    def good(self, placement: Placement) -> Counts:
        """[M] accepted requests that count."""
        total: Counts = self.good_by_chunk(placement).sum(axis=0)
        return total

    def good_by_chunk(self, placement: Placement) -> Counts:
        """[CHUNKS, M], in each part of the trace."""
        self.evaluations += 1
        good = np.zeros((CHUNKS, len(self.arrived)), dtype=np.int64)
        count_good(self.arrays, placement.layout, placement.hosted, self._everything, good, good.copy(), np.inf)
        return good
