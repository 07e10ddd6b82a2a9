"""Local search over placements, compiled: moves of models and layouts, accepted by simulated annealing, the best kept.

A move touches one or two groups; only the requests of models that share a group with them, directly or through others,
are simulated again. Everything is decided by the seed and the number of evaluations. Called by ``search``.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from loraplex.simulator.alpaserve import Indices, Mask, Seconds, StageSeconds, serve_from
from loraplex.simulator.compiled import compiled

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

ADD, REMOVE, MOVE, SWAP, RESHAPE, SPLIT, MERGE, COPY = range(8)
MOVE_NAMES = ("add", "remove", "move", "swap", "reshape", "split", "merge", "copy")

CHUNKS = 24
"""Parts of the trace after which a placement that is behind is given up."""
HOPE = 0.02
"""Of the requests lost by the placement before: how far one may be behind in between."""


class Arrays(NamedTuple):
    """A problem as compiled code takes it; names as in ``Problem``."""

    arrival_s: Seconds
    model: Indices
    slo_s: Seconds
    first: int
    """Requests in [first, last) count."""
    last: int
    num_gpus: Indices
    num_stages: Indices
    stage_s: StageSeconds
    weight_gib: Floats
    memory_gib: float


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


@compiled
def used_gib(arrays: Arrays, layout: int, hosted: Mask) -> float:
    """Of the fullest GPU of a group; ``hosted`` [M]."""
    total = 0.0
    for m in range(len(hosted)):
        if hosted[m]:
            total += arrays.weight_gib[layout, m]
    return total


@compiled
def evict(arrays: Arrays, layout: int, hosted: Mask, keep: int) -> None:
    """Drops models at random, never ``keep``, until the weights fit; those that the layout cannot serve first."""
    num_models = len(hosted)
    for m in range(num_models):
        if hosted[m] and arrays.weight_gib[layout, m] == np.inf:
            hosted[m] = False
    used = used_gib(arrays, layout, hosted)
    while used > arrays.memory_gib + 1e-9:
        count = 0
        for m in range(num_models):
            if hosted[m] and m != keep:
                count += 1
        pick = np.random.randint(count)
        for m in range(num_models):
            if hosted[m] and m != keep:
                if pick == 0:
                    hosted[m] = False
                    used = used_gib(arrays, layout, hosted)
                    break
                pick -= 1


@compiled
def random_layout(arrays: Arrays, gpus: int, other_than: int) -> int:
    """One of so many GPUs; -1 when there is no other."""
    count = 0
    for index in range(len(arrays.num_gpus)):
        if arrays.num_gpus[index] == gpus and index != other_than:
            count += 1
    if count == 0:
        return -1
    pick = np.random.randint(count)
    for index in range(len(arrays.num_gpus)):
        if arrays.num_gpus[index] == gpus and index != other_than:
            if pick == 0:
                return index
            pick -= 1
    return -1


@compiled
def random_model(hosted: Mask, present: bool) -> int:
    """A model that ``hosted`` has, or lacks; -1 when there is none."""
    count = 0
    for m in range(len(hosted)):
        if hosted[m] == present:
            count += 1
    if count == 0:
        return -1
    pick = np.random.randint(count)
    for m in range(len(hosted)):
        if hosted[m] == present:
            if pick == 0:
                return m
            pick -= 1
    return -1


@compiled
def random_group(layout: Indices, other_than: int) -> int:
    """A group in use; -1 when there is no other."""
    count = 0
    for g in range(len(layout)):
        if layout[g] >= 0 and g != other_than:
            count += 1
    if count == 0:
        return -1
    pick = np.random.randint(count)
    for g in range(len(layout)):
        if layout[g] >= 0 and g != other_than:
            if pick == 0:
                return g
            pick -= 1
    return -1


@compiled
def needy_model(lost: Floats) -> int:
    """At random, in proportion to the requests that each model loses."""
    point = np.random.random() * lost.sum()
    for m in range(len(lost)):
        point -= lost[m]
        if point < 0:
            return m
    return len(lost) - 1


@compiled
def propose(arrays: Arrays, kind: int, layout: Indices, hosted: Mask, lost: Floats, touched: Indices) -> bool:
    """Changes ``layout`` and ``hosted`` by one move; False when there is none of this kind. ``touched`` [2]: the groups
    that changed, -1 for none."""
    touched[0] = touched[1] = -1
    g = random_group(layout, -1)
    if g < 0:
        return False
    touched[0] = g
    if kind == ADD:
        m = needy_model(lost)
        if hosted[g, m] or arrays.weight_gib[layout[g], m] > arrays.memory_gib:
            return False
        hosted[g, m] = True
        evict(arrays, layout[g], hosted[g], m)
        return True
    if kind == REMOVE:
        m = random_model(hosted[g], True)
        if m < 0:
            return False
        hosted[g, m] = False
        return True
    if kind == RESHAPE:
        other = random_layout(arrays, arrays.num_gpus[layout[g]], layout[g])
        if other < 0:
            return False
        layout[g] = other
        evict(arrays, other, hosted[g], -1)
        return True
    if kind == SPLIT:
        gpus = arrays.num_gpus[layout[g]]
        if gpus % 2:
            return False
        free = -1
        for index in range(len(layout)):
            if layout[index] < 0:
                free = index
                break
        left, right = random_layout(arrays, gpus // 2, -1), random_layout(arrays, gpus // 2, -1)
        if free < 0 or left < 0:
            return False
        layout[g], layout[free] = left, right
        for m in range(hosted.shape[1]):
            hosted[free, m] = False
            if hosted[g, m]:
                side = np.random.randint(3)
                hosted[g, m] = side != 0
                hosted[free, m] = side != 1
        evict(arrays, left, hosted[g], -1)
        evict(arrays, right, hosted[free], -1)
        touched[1] = free
        return True
    h = random_group(layout, g)
    if h < 0:
        return False
    touched[1] = h
    if kind in (MOVE, SWAP):
        m = random_model(hosted[g], True)
        if m < 0 or hosted[h, m] or arrays.weight_gib[layout[h], m] > arrays.memory_gib:
            return False
        if kind == SWAP:
            n = random_model(hosted[h], True)
            if n < 0 or hosted[g, n] or arrays.weight_gib[layout[g], n] > arrays.memory_gib:
                return False
            hosted[h, n] = False
            hosted[g, n] = True
            hosted[g, m] = False
            evict(arrays, layout[g], hosted[g], n)
        hosted[g, m] = False
        hosted[h, m] = True
        evict(arrays, layout[h], hosted[h], m)
        return True
    if arrays.num_gpus[layout[g]] != arrays.num_gpus[layout[h]]:
        return False
    if kind == COPY:
        layout[h] = layout[g]
        hosted[h] = hosted[g]
        return True
    merged = random_layout(arrays, 2 * arrays.num_gpus[layout[g]], -1)
    if merged < 0:
        return False
    layout[g], layout[h] = merged, -1
    for m in range(hosted.shape[1]):
        hosted[g, m] = hosted[g, m] or hosted[h, m]
        hosted[h, m] = False
    evict(arrays, merged, hosted[g], -1)
    return True


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
