"""How many requests of which models a placement serves, compiled: the contract's order of groups, and giving up early.

Called by ``anneal`` and ``evaluation``.
"""

import numpy as np

from loraplex.planner.alpaserve.arrays import Arrays, Counts
from loraplex.simulator.alpaserve import Indices, Mask, serve_from
from loraplex.simulator.compiled import compiled

CHUNKS = 24
"""Parts of the trace after which a placement that is behind is given up."""


@compiled
def comes_before(left: Mask, right: Mask) -> bool:
    """Whether the ascending list of models of ``left`` [M] is less than that of ``right``."""
    num_models = len(left)
    for m in range(num_models):
        if left[m] != right[m]:
            rest = right if left[m] else left
            for later in range(m + 1, num_models):
                if rest[later]:
                    return bool(left[m])
            return not left[m]
    return False


@compiled
def contract_order(hosted: Mask) -> Indices:
    """[G] groups by their lists of models, stable: the order in which the contract looks at groups that are free at the
    same time."""
    order = np.arange(hosted.shape[0]).astype(np.int32)
    for index in range(1, len(order)):
        group = order[index]
        place = index
        while place > 0 and comes_before(hosted[group], hosted[order[place - 1]]):
            order[place] = order[place - 1]
            place -= 1
        order[place] = group
    return order


@compiled
def count_good(
    arrays: Arrays, layout: Indices, hosted: Mask, wanted: Mask, good: Counts, known: Counts, allowed: float
) -> bool:
    """Writes ``good`` [CHUNKS, M], the accepted requests that count in each part of the trace, for the models of
    ``wanted``; the others' groups must be disjoint from theirs. ``layout`` [G] (-1: unused), ``hosted`` [G, M].

    Gives up, False, once it is more than ``allowed`` requests behind ``known`` [CHUNKS, M]: what is behind by then
    hardly ever catches up.
    """
    num_groups, num_models = hosted.shape
    first_host = np.zeros(num_models + 1, dtype=np.int32)
    hosts = np.empty(num_groups * num_models, dtype=np.int32)
    order = contract_order(hosted)
    count = 0
    for m in range(num_models):
        if wanted[m]:
            for g in order:
                if layout[g] >= 0 and hosted[g, m]:
                    hosts[count] = g
                    count += 1
        first_host[m + 1] = count
    stages = np.ones(num_groups, dtype=np.int32)
    most = 1
    for g in range(num_groups):
        if layout[g] >= 0:
            stages[g] = arrays.num_stages[layout[g]]
            most = max(most, stages[g])
    stage_s = np.zeros((num_groups, num_models, most), dtype=np.float32)
    for g in range(num_groups):
        if layout[g] >= 0:
            for m in range(num_models):
                if hosted[g, m] and wanted[m]:
                    for s in range(stages[g]):
                        stage_s[g, m, s] = arrays.stage_s[layout[g], m, s]
    clocks = np.zeros((num_groups, most), dtype=np.float64)
    num_requests = len(arrays.arrival_s)
    accepted = np.empty(num_requests, dtype=np.bool_)
    behind = 0
    for chunk in range(CHUNKS):
        start, end = chunk * num_requests // CHUNKS, (chunk + 1) * num_requests // CHUNKS
        serve_from(
            clocks,
            arrays.arrival_s[start:end],
            arrays.model[start:end],
            arrays.slo_s,
            first_host,
            hosts,
            stages,
            stage_s,
            accepted[start:end],
        )
        for m in range(num_models):
            if wanted[m]:
                good[chunk, m] = 0
        for r in range(max(start, arrays.first), min(end, arrays.last)):
            if accepted[r]:
                good[chunk, arrays.model[r]] += 1
        for m in range(num_models):
            if wanted[m]:
                behind += known[chunk, m] - good[chunk, m]
        if behind > allowed:
            return False
    return True
