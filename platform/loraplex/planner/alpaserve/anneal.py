"""Local search over placements, compiled: moves of models and layouts, accepted by simulated annealing, the best kept.

A move touches one or two groups; only the requests of models that share a group with them, directly or through others,
are simulated again. Everything is decided by the seed and the number of evaluations. Called by ``search``.
"""

import numpy as np

from loraplex.planner.alpaserve.arrays import Arrays, Counts, Floats
from loraplex.planner.alpaserve.counting import count_good
from loraplex.planner.alpaserve.proposals import propose
from loraplex.simulator.alpaserve import Indices, Mask
from loraplex.simulator.compiled import compiled

HOPE = 0.02
"""Of the requests lost by the placement before: how far one may be behind in between."""


@compiled
def mark_connected(layout: Indices, hosted: Mask, touched: Indices, wanted: Mask) -> None:
    """Adds to ``wanted`` the models of the touched groups and of all groups joined to these by shared models."""
    num_groups, num_models = hosted.shape
    inside = np.zeros(num_groups, dtype=np.bool_)
    for g in touched:
        if g >= 0 and layout[g] >= 0:
            inside[g] = True
    for g in range(num_groups):
        if layout[g] >= 0 and not inside[g]:
            for m in range(num_models):
                if hosted[g, m] and wanted[m]:
                    inside[g] = True
                    break
    grown = True
    while grown:
        grown = False
        for g in range(num_groups):
            if inside[g]:
                for m in range(num_models):
                    if hosted[g, m] and not wanted[m]:
                        wanted[m] = True
                        grown = True
        for g in range(num_groups):
            if layout[g] >= 0 and not inside[g]:
                for m in range(num_models):
                    if hosted[g, m] and wanted[m]:
                        inside[g] = True
                        grown = True
                        break


@compiled
def anneal(
    arrays: Arrays,
    layout: Indices,
    hosted: Mask,
    good: Counts,
    best_layout: Indices,
    best_hosted: Mask,
    best: int,
    arrived: Counts,
    steps: tuple[int, int, int],
    temperatures: tuple[float, float],
    odds: Floats,
    seed: int,
    gained: Counts,
) -> tuple[int, int]:
    """Part of a run: steps [first, last) of ``length``. Returns the accepted requests that count of the best placement
    seen, and the evaluations used (fewer than steps once every request is served).

    Moves ``layout`` [G], ``hosted`` [G, M] and their ``good`` [CHUNKS, M] on, ``best_layout`` and ``best_hosted`` when
    they beat ``best``. ``arrived`` [M]: requests that count. ``temperatures``: at the first and the last step, in
    requests, falling geometrically. ``odds`` [8]: cumulated chances of the kinds of moves. ``gained`` [8]: requests
    that new bests brought, by kind.
    """
    np.random.seed(seed)
    first, last, length = steps
    warmest, coldest = temperatures
    num_models = hosted.shape[1]
    total = arrived.sum()
    score = good.sum()
    touched = np.empty(2, dtype=np.int32)
    used = 0
    for step in range(first, last):
        if best == total:
            break
        used += 1
        old_layout, old_hosted = layout.copy(), hosted.copy()
        lost = (arrived - good.sum(axis=0)) + 0.01 * arrived
        for _ in range(50):
            kind = np.searchsorted(odds, np.random.random(), side="right")
            if propose(arrays, int(kind), layout, hosted, lost, touched):
                break
            layout[:] = old_layout
            hosted[:] = old_hosted
            touched[0] = touched[1] = -1
        wanted = np.zeros(num_models, dtype=np.bool_)
        mark_connected(old_layout, old_hosted, touched, wanted)
        mark_connected(layout, hosted, touched, wanted)
        mark_connected(old_layout, old_hosted, touched, wanted)
        mark_connected(layout, hosted, touched, wanted)
        new_good = good.copy()
        temperature = warmest * (coldest / warmest) ** (step / length)
        # Metropolis: a placement that is worse by d is taken with probability exp(-d / temperature).
        allowed = -temperature * np.log(1.0 - np.random.random())
        finished = count_good(arrays, layout, hosted, wanted, new_good, good, allowed + HOPE * (total - score))
        new_score = new_good.sum()
        if finished and new_score >= score - allowed:
            score = new_score
            good[:] = new_good
            if score > best:
                gained[kind] += score - best
                best = score
                best_layout[:] = layout
                best_hosted[:] = hosted
        else:
            layout[:] = old_layout
            hosted[:] = old_hosted
    return best, used
