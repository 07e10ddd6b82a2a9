"""Groups to begin with: for each base a kind of group, as many of each as its share of the load asks for.

Called by ``search`` and ``baselines``.
"""

from collections.abc import Iterator, Mapping
from itertools import islice, product

from loraplex.core.ids import BaseModelId
from loraplex.planner.capacity import Capacity, Demand
from loraplex.planner.problem import Kind, Problem, place

_KINDS_PER_BASE = 4
_MAX_STARTS = 48
_NEARLY = 0.75

Capacities = Mapping[tuple[Kind, BaseModelId], Capacity]


def best_kinds(problem: Problem, capacity: Capacities, base: BaseModelId) -> list[Kind]:
    """Kinds for this base alone, the most requests per second and GPU first."""
    alone = [kind for kind, of in capacity if of == base and kind.bases == (base,)]
    alone = [kind for kind in alone if capacity[kind, base].requests_per_s > 0]
    return sorted(alone, key=lambda kind: (-_per_gpu(capacity, kind, base), kind.shape.num_ranks))


def mixtures(
    problem: Problem, capacity: Capacities, demand: Mapping[BaseModelId, Demand]
) -> Iterator[tuple[Kind, ...]]:
    """One kind for each base, the likelier ones first; then groups that hold all bases together."""
    ranked = [best_kinds(problem, capacity, base)[:_KINDS_PER_BASE] for base in problem.bases]
    if all(ranked):
        combinations = sorted(
            product(*(range(len(kinds)) for kinds in ranked)), key=lambda places: (sum(places), places)
        )
        for places in islice(combinations, _MAX_STARTS):
            chosen = [kinds[place] for kinds, place in zip(ranked, places, strict=True)]
            for only in (True, False):
                yield filled(problem, capacity, demand, dict(zip(problem.bases, chosen, strict=True)), only=only)
    for kind in dict.fromkeys(kind for kind, _ in capacity):
        if len(problem.bases) > 1 and set(kind.bases) == set(problem.bases):
            yield filled(problem, capacity, demand, dict.fromkeys(problem.bases, kind))


def filled(
    problem: Problem,
    capacity: Capacities,
    demand: Mapping[BaseModelId, Demand],
    kind_of: Mapping[BaseModelId, Kind],
    first: tuple[Kind, ...] = (),
    *,
    only: bool = False,
) -> tuple[Kind, ...]:
    """Groups on all GPUs, beyond ``first``: the base with most load for what its groups can serve gets the next, of its
    kind; where that no longer fits, of another that serves nearly as much per GPU (unless ``only``). Sorted."""
    groups = list(first)
    open_bases = [base for base in problem.bases if demand[base].requests_per_s > 0]
    while open_bases:
        able = {
            base: sum(capacity[kind, base].requests_per_s / len(kind.bases) for kind in groups if base in kind.bases)
            for base in open_bases
        }
        base = max(open_bases, key=lambda b: demand[b].requests_per_s / max(able[b], 1e-9))
        ranked = [] if only else best_kinds(problem, capacity, base)
        least = _NEARLY * max((_per_gpu(capacity, kind, base) for kind in ranked), default=0.0)
        others = [kind for kind in ranked if _per_gpu(capacity, kind, base) >= least]
        for kind in [kind_of[base], *others] if base in kind_of else others:
            if place(problem.nodes, [*groups, kind]) is not None:
                groups.append(kind)
                break
        else:
            open_bases.remove(base)
    return tuple(sorted(groups, key=str))


def _per_gpu(capacity: Capacities, kind: Kind, base: BaseModelId) -> float:
    """Requests per second."""
    return capacity[kind, base].requests_per_s / kind.shape.num_ranks
