"""What others do, with the same simulator and tuned over a stated grid: to compare a plan with.

* ``selective replication``: the same search, each base in its smallest feasible shape (AlpaServe's "SR").
* ``round robin``: one shape for all, adapters dealt to the groups of their base in turn.
* ``AlpaServe greedy``: one shape for all groups, bases together where they fit; ``bucketed``: a shape for each base.
* ``rendezvous``: replicas of an adapter in proportion to its demand, on groups by rendezvous hashing, capacities kept
  by a min-cost flow (as NVIDIA Dynamo's LoRA routing).
* ``every-replica LRU``: every group takes every adapter (Ray Serve's multiplexing, vLLM's slots).

Called by the command ``plan``.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import ceil

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array

from loraplex.core.ids import BaseModelId, ReplicaId
from loraplex.core.plan import AdapterShare, GroupPlan, Plan
from loraplex.planner.capacity import Demand, capacities, demands
from loraplex.planner.packing import EVERYWHERE, Choice, Traffic, to_plan
from loraplex.planner.problem import Kind, Problem, kinds
from loraplex.planner.sample import MAX_REQUESTS, sampled
from loraplex.planner.scoring import Scorer
from loraplex.planner.search import Found, Search
from loraplex.planner.starts import Capacities, best_kinds, filled
from loraplex.router.policy import affinity

_SPREADS = (EVERYWHERE, 1.0, 2.0, 4.0)
_SHARES = (1.0, 2.0, 4.0)
_SELECTIVE_EVALUATIONS = 40
_BUCKET_KINDS = 3
"""Of each base, the best by their capacity."""
_BUCKET_FACTORS = (0.5, 1.0, 2.0)
_BUCKET_SPREADS = (EVERYWHERE, 2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    name: str
    plan: Plan
    attainment: float
    """On the trace that it was tuned on."""
    setting: str
    """The best of its grid."""
    tried: int
    is_alpaserve: bool


def baselines(problem: Problem, *, max_sample: int = MAX_REQUESTS, seed: int = 0) -> tuple[Baseline, ...]:
    """All of them, tuned on the planning trace (its sample); those for which there is no layout are left out."""
    demand = demands(problem)
    capacity = capacities(problem, kinds(problem), demand)
    traffic = Traffic.of(problem)
    sample = sampled(problem.arrivals, max_sample)
    scorer = Scorer(problem, traffic, capacity, sample)
    smallest = _smallest(problem, capacity)
    found = [selective(problem, max_sample=max_sample, seed=seed)[0]]
    uniform = [one for one in _uniform(problem, capacity, demand) if _serves_all(problem, one[1])]
    fixed = filled(problem, capacity, demand, smallest, only=True)
    with_smallest = [*uniform, ("smallest", fixed)] if _serves_all(problem, fixed) else uniform
    per_base = [one for one in _per_base(problem, capacity, demand) if _serves_all(problem, one[1])]
    together = [
        (f"{kind}", filled(problem, capacity, demand, dict.fromkeys(problem.bases, kind), only=True))
        for kind in dict.fromkeys(kind for kind, _ in capacity)
        if len(problem.bases) > 1 and set(kind.bases) == set(problem.bases)
    ]
    spread, bucket_spread = (
        [(f"spread {value:g}", dict.fromkeys(problem.bases, value)) for value in values]
        for values in (_SPREADS, _BUCKET_SPREADS)
    )
    families: list[tuple[str, bool, Iterator[tuple[str, Choice, Plan]]]] = [
        ("round robin", False, _dealt(problem, scorer, uniform)),
        ("AlpaServe greedy", True, _spread(scorer, [*uniform, *together], spread)),
        ("AlpaServe bucketed", True, _spread(scorer, per_base, bucket_spread)),
        ("rendezvous", False, _rendezvous(problem, scorer, with_smallest)),
        ("every-replica LRU", False, _spread(scorer, with_smallest, spread[:1])),
    ]
    for name, is_alpaserve, candidates in families:
        scored = [(scorer.score_plan(plan, choice), plan, setting) for setting, choice, plan in candidates]
        if scored:
            best, plan, setting = max(scored, key=lambda one: one[0].attainment)
            found.append(
                Baseline(
                    name=name,
                    plan=plan,
                    attainment=best.attainment,
                    setting=setting,
                    tried=len(scored),
                    is_alpaserve=is_alpaserve,
                )
            )
    return tuple(found)


def _serves_all(problem: Problem, groups: tuple[Kind, ...]) -> bool:
    """Small fleets may have no room for a large shape of every base."""
    return set(problem.bases) == {base for kind in groups for base in kind.bases}


def selective(problem: Problem, *, max_sample: int = MAX_REQUESTS, seed: int = 0) -> tuple[Baseline, Found]:
    """Selective replication, and what its search found on the whole trace."""
    capacity = capacities(problem, kinds(problem), demands(problem))
    smallest = _smallest(problem, capacity)
    chosen = set(smallest.values())
    found = Search(
        problem,
        evaluations=_SELECTIVE_EVALUATIONS,
        seed=seed,
        only_kinds=lambda kind: kind in chosen,
        max_sample=max_sample,
    ).run()
    baseline = Baseline(
        name="selective replication",
        plan=found.plan,
        attainment=found.sample_attainment,
        setting=", ".join(f"{kind}" for kind in smallest.values()),
        tried=found.evaluations,
        is_alpaserve=False,
    )
    return baseline, found


def _smallest(problem: Problem, capacity: Capacities) -> dict[BaseModelId, Kind]:
    """Of each base the smallest kind that meets its targets."""
    return {
        base: min(best_kinds(problem, capacity, base), key=lambda kind: kind.shape.num_ranks) for base in problem.bases
    }


def _uniform(
    problem: Problem, capacity: Capacities, demand: Mapping[BaseModelId, Demand]
) -> Iterator[tuple[str, tuple[Kind, ...]]]:
    """One shape for the groups of all bases."""
    alone = [kind for kind, _ in capacity if len(kind.bases) == 1]
    for gpu, shape in dict.fromkeys((kind.gpu, kind.shape) for kind in alone):
        kind_of = {base: Kind(gpu, shape, (base,)) for base in problem.bases}
        if all(kind in alone and capacity[kind, base].requests_per_s > 0 for base, kind in kind_of.items()):
            yield f"tp{shape.tp} pp{shape.pp}", filled(problem, capacity, demand, kind_of, only=True)


def _per_base(
    problem: Problem, capacity: Capacities, demand: Mapping[BaseModelId, Demand]
) -> Iterator[tuple[str, tuple[Kind, ...]]]:
    """A bucket and a shape for each base; GPUs by its demand, and with the first base's demand less or more."""
    ranked = [best_kinds(problem, capacity, base)[:_BUCKET_KINDS] for base in problem.bases]
    first = problem.bases[0]
    for chosen in product(*ranked):
        kind_of = dict(zip(problem.bases, chosen, strict=True))
        for factor in _BUCKET_FACTORS if len(problem.bases) > 1 else (1.0,):
            rate = factor * demand[first].requests_per_s
            tilted = {**demand, first: replace(demand[first], requests_per_s=rate)}
            groups = filled(problem, capacity, tilted, kind_of, only=True)
            yield f"{', '.join(map(str, chosen))}, {factor:g} x demand of {first}", groups


def _spread(
    scorer: Scorer,
    layouts: Sequence[tuple[str, tuple[Kind, ...]]],
    spreads: Sequence[tuple[str, Mapping[BaseModelId, float]]],
) -> Iterator[tuple[str, Choice, Plan]]:
    for (layout, groups), (setting, spread) in product(layouts, spreads):
        choice = Choice(groups=groups, spread=spread)
        plan = to_plan(scorer.problem, scorer.traffic, scorer.capacity, choice)
        if plan is not None:
            yield f"{layout}, {setting}", choice, plan


def _dealt(
    problem: Problem, scorer: Scorer, layouts: Sequence[tuple[str, tuple[Kind, ...]]]
) -> Iterator[tuple[str, Choice, Plan]]:
    for layout, groups in layouts:
        choice = Choice(groups=groups)
        plan = to_plan(problem, scorer.traffic, scorer.capacity, choice)
        if plan is None:
            continue
        listed: dict[tuple[int, BaseModelId], list[int]] = {}
        for base, adapters in scorer.traffic.base.items():
            hosts = [g for g, kind in enumerate(groups) if base in kind.bases]
            for turn, adapter in enumerate(sorted(adapters.tolist())):
                listed.setdefault((hosts[turn % len(hosts)], base), []).append(adapter)
        yield layout, choice, _with_adapters(problem, plan, listed)


def _rendezvous(
    problem: Problem, scorer: Scorer, layouts: Sequence[tuple[str, tuple[Kind, ...]]]
) -> Iterator[tuple[str, Choice, Plan]]:
    for (layout, groups), share in product(layouts, _SHARES):
        choice = Choice(groups=groups)
        plan = to_plan(problem, scorer.traffic, scorer.capacity, choice)
        if plan is None:
            continue
        listed: dict[tuple[int, BaseModelId], list[int]] = {}
        for base, adapters in scorer.traffic.base.items():
            hosts = [g for g, kind in enumerate(groups) if base in kind.bases]
            if len(adapters):
                names = [plan.groups[g].name for g in hosts]
                for adapter, position in _flow(problem, scorer.traffic, adapters.tolist(), names, share):
                    listed.setdefault((hosts[position], base), []).append(adapter)
        yield f"{layout}, {share:g} x demand", choice, _with_adapters(problem, plan, listed)


def _flow(
    problem: Problem, traffic: Traffic, adapters: list[int], names: list[str], share: float
) -> list[tuple[int, int]]:
    """(Adapter, position of a group): each adapter on as many groups as its demand asks, where its hash likes them
    best, groups holding equal numbers at most. A transport problem, whose corners are whole numbers."""
    rates = traffic.requests_per_s[adapters]
    count = len(names)
    replicas = np.clip(np.ceil(share * count * rates / max(float(rates.sum()), 1e-12)), 1, count)
    slots = ceil(float(replicas.sum()) / count)
    rank = np.array(
        [
            np.argsort(np.argsort([-affinity(_key(problem, adapter), ReplicaId(name)) for name in names]))
            for adapter in adapters
        ]
    )
    cells = np.arange(len(adapters) * count)
    ones = np.ones(len(cells))
    each = coo_array((ones, (cells // count, cells))).tocsr()
    held = coo_array((ones, (cells % count, cells))).tocsr()
    solution = linprog(
        rank.ravel().astype(np.float64),
        A_ub=held,
        b_ub=np.full(count, float(slots)),
        A_eq=each,
        b_eq=replicas,
        bounds=(0, 1),
        method="highs",
    )
    chosen = np.flatnonzero(solution.x > 0.5)
    return [(adapters[cell // count], cell % count) for cell in chosen.tolist()]


def _key(problem: Problem, adapter: int) -> bytes:
    name = problem.arrivals.adapters[adapter]
    return f"{name.tenant}/{name.name}".encode()


def _with_adapters(problem: Problem, plan: Plan, listed: Mapping[tuple[int, BaseModelId], list[int]]) -> Plan:
    names = problem.arrivals.adapters

    def group_with(index: int, group: GroupPlan) -> GroupPlan:
        return replace(
            group,
            bases=tuple(
                replace(
                    placed,
                    adapters=tuple(
                        AdapterShare(tenant=names[adapter].tenant, name=names[adapter].name)
                        for adapter in sorted(listed.get((index, placed.base_model_id), []))
                    ),
                )
                for placed in group.bases
            ),
        )

    return replace(plan, groups=tuple(group_with(index, group) for index, group in enumerate(plan.groups)))
