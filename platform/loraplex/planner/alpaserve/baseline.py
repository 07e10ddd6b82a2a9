"""AlpaServe's own search (Li et al., OSDI 2023, algorithms 1 and 2, fast heuristic), to compare with.

All groups have one layout; models are added one at a time where they are missed most; the best layout wins. Called by
``replan`` for the static placement that a re-planned one is held against, and by tests.
"""

import numpy as np

from loraplex.planner.alpaserve.evaluation import Evaluation
from loraplex.planner.alpaserve.problem import MEMORY_SLACK_GIB, Placement, Problem, to_groups
from loraplex.simulator.alpaserve import Group


def alpaserve_search(problem: Problem) -> tuple[Group, ...]:
    """The best of the greedy placements over uniform layouts."""
    evaluation = Evaluation(problem)
    found = [greedy(problem, layout, evaluation) for layout in range(len(problem.layouts))]
    return to_groups(problem, max(found, key=lambda placement: int(evaluation.good(placement).sum())))


def greedy(problem: Problem, layout: int, evaluation: Evaluation) -> Placement:
    """Adds the model that loses most requests to the least used group that has room for it, until none is left."""
    size = problem.num_devices
    placement = Placement(np.full(size, -1, dtype=np.int32), np.zeros((size, problem.num_models), dtype=np.bool_))
    count = size // int(problem.num_gpus[layout])
    placement.layout[:count] = layout
    used = np.zeros(count)
    weights = problem.weight_gib[layout]
    seconds = problem.stage_s[layout].max(axis=1).astype(np.float64)
    best, most = placement, -1
    while True:
        good = evaluation.good(placement)
        if int(good.sum()) > most:
            most, best = int(good.sum()), Placement(placement.layout.copy(), placement.hosted.copy())
        copies = np.maximum(placement.hosted.sum(axis=0), 1)
        load = (placement.hosted[:count] * (good * seconds / copies)).sum(axis=1)
        for model in np.argsort(good - evaluation.arrived, kind="stable"):
            open_groups = np.flatnonzero(
                ~placement.hosted[:count, model] & (used + weights[model] <= problem.memory_gib + MEMORY_SLACK_GIB)
            )
            if good[model] < evaluation.arrived[model] and len(open_groups):
                group = open_groups[np.argmin(load[open_groups])]
                placement.hosted[group, model] = True
                used[group] += weights[model]
                break
        else:
            return best
