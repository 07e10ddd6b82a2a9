"""Placements to start from: groups of one or two layouts, models spread over them by load, with and without buckets.

A bucket keeps models of alike latency apart (AlpaServe, section 4.2): a short request does not wait behind a long one.
Called by ``search``.
"""

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np

from loraplex.planner.alpaserve.arrays import Floats
from loraplex.planner.alpaserve.problem import MEMORY_SLACK_GIB, Placement, Problem
from loraplex.simulator.alpaserve import Mask

Bucket = tuple[Sequence[int], Mask]
"""Layouts of its groups, and which models they may host [M]."""


def uniform(problem: Problem, layout: int) -> Placement:
    """All models on groups of one layout."""
    groups = [layout] * (problem.num_devices // int(problem.num_gpus[layout]))
    return spread(problem, [(groups, np.ones(problem.num_models, dtype=np.bool_))])


def mixed_seeds(problem: Problem, layouts: Sequence[int]) -> Iterator[Placement]:
    """Two layouts, each on part of the devices: all models on both, or short models on one and long on the other."""
    everything = np.ones(problem.num_models, dtype=np.bool_)
    for left, right in product(layouts, repeat=2):
        for groups in _device_splits(problem, left, right):
            if left < right:
                yield spread(problem, [(groups[0] + groups[1], everything)])
            for short in _latency_cuts(problem):
                yield spread(problem, [(groups[0], short), (groups[1], ~short)])


def spread(problem: Problem, buckets: Sequence[Bucket]) -> Placement:
    """In each bucket: every model once, the busiest first, on the group with the least load that has room; then further
    copies of what has most load per copy, until nothing fits."""
    size = problem.num_devices
    placement = Placement(np.full(size, -1, dtype=np.int32), np.zeros((size, problem.num_models), dtype=np.bool_))
    next_group = 0
    for groups, models in buckets:
        span = range(next_group, next_group + len(groups))
        placement.layout[next_group : next_group + len(groups)] = groups
        next_group += len(groups)
        _fill(problem, placement, span, models)
    return placement


def _fill(problem: Problem, placement: Placement, span: range, models: Mask) -> None:
    requests = np.bincount(problem.work.model, minlength=problem.num_models)
    # Seconds of the slowest stage that each request takes: what bounds a pipeline's rate.
    seconds = problem.stage_s.max(axis=2).astype(np.float64) * requests
    copies = np.zeros(problem.num_models, dtype=np.int64)
    load = np.zeros(problem.num_devices)
    used = np.zeros(problem.num_devices)
    open_models = models.copy()
    busiest: Floats = seconds[placement.layout[list(span)]].mean(axis=0)
    while open_models.any():
        # Models without a copy go before all others.
        rank = np.where(copies == 0, 1e18, 0.0) + busiest / np.maximum(copies, 1)
        model = int(np.argmax(np.where(open_models, rank, -1.0)))
        fitting = [
            g
            for g in span
            if not placement.hosted[g, model]
            and used[g] + problem.weight_gib[placement.layout[g], model] <= problem.memory_gib + MEMORY_SLACK_GIB
        ]
        if not fitting:
            open_models[model] = False
            continue
        group = min(fitting, key=lambda g: load[g])
        placement.hosted[group, model] = True
        used[group] += problem.weight_gib[placement.layout[group], model]
        load[group] += seconds[placement.layout[group], model] / (copies[model] + 1)
        copies[model] += 1


def _device_splits(problem: Problem, left: int, right: int) -> Iterator[tuple[list[int], list[int]]]:
    """About a quarter, half and three quarters of the devices for ``left``."""
    left_gpus, right_gpus = int(problem.num_gpus[left]), int(problem.num_gpus[right])
    seen = set()
    for quarter in (1, 2, 3):
        count = max(1, round(problem.num_devices * quarter / 4 / left_gpus))
        rest = (problem.num_devices - count * left_gpus) // right_gpus
        if rest > 0 and count not in seen:
            seen.add(count)
            yield [left] * count, [right] * rest


def _latency_cuts(problem: Problem) -> Iterator[Mask]:
    """[M] which models are short, for each cut between model types of different latency."""
    latency = problem.stage_s.astype(np.float64).sum(axis=2)
    known = np.where(latency > 0, latency, np.nan)
    typical = np.nanmin(known, axis=0)
    for cut in np.unique(typical)[1:]:
        yield typical < cut
