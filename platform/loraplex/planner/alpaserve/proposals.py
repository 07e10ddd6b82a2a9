"""Moves of models and layouts, compiled: a neighbour of a placement that fits in memory. Called by ``anneal``."""

import numpy as np

from loraplex.planner.alpaserve.arrays import Arrays, Floats
from loraplex.simulator.alpaserve import Indices, Mask
from loraplex.simulator.compiled import compiled

ADD, REMOVE, MOVE, SWAP, RESHAPE, SPLIT, MERGE, COPY = range(8)
MOVE_NAMES = ("add", "remove", "move", "swap", "reshape", "split", "merge", "copy")


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
