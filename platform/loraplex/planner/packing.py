"""From groups to a plan: which adapters each group lists, on which nodes it lies. Deterministic.

Adapters go, the busiest first, to the groups with the least load for what they can serve; a hot one to several. Called
by ``search`` and ``baselines``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil

import numpy as np

from loraplex.core.ids import BaseModelId
from loraplex.core.plan import AdapterShare, BasePlacement, GroupPlan, Plan
from loraplex.planner.capacity import Capacity
from loraplex.planner.problem import Kind, Problem, place
from loraplex.simulator.types import FloatArray, IntArray

EVERYWHERE = 0.0
"""A spread: every group of the base takes every adapter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a search decides; ``to_plan`` does the rest."""

    groups: tuple[Kind, ...]
    """Sorted."""
    spread: Mapping[BaseModelId, float] = field(default_factory=dict)
    """By base: groups for an adapter that asks for a group's whole capacity; ``EVERYWHERE`` (the default): no sets."""
    extra: Mapping[int, int] = field(default_factory=dict)
    """Adapter -> more (or fewer) groups than its spread gives it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Of each adapter, as the plan sees it."""

    requests_per_s: FloatArray
    """[A]"""
    base: Mapping[BaseModelId, IntArray]
    """Its adapters, busiest first."""

    @classmethod
    def of(cls, problem: Problem) -> "Traffic":
        arrivals = problem.arrivals
        counts = np.bincount(arrivals.adapter[arrivals.adapter >= 0], minlength=len(arrivals.adapters))
        span_s = max(float(arrivals.arrival_s[-1] - arrivals.arrival_s[0]), 1e-9)
        order = np.argsort(-counts, kind="stable")
        bases = np.array([adapter.base_model or "" for adapter in arrivals.adapters], dtype=object)
        return cls(
            requests_per_s=counts / span_s,
            base={base: order[bases[order] == base].astype(np.int32) for base in problem.bases},
        )


def to_plan(
    problem: Problem,
    traffic: Traffic,
    capacity: Mapping[tuple[Kind, BaseModelId], Capacity],
    choice: Choice,
    version: int = 1,
) -> Plan | None:
    """None when the groups do not fit on the nodes."""
    nodes = place(problem.nodes, choice.groups)
    if nodes is None:
        return None
    listed: list[dict[BaseModelId, list[tuple[int, float]]]] = [{base: [] for base in k.bases} for k in choice.groups]
    for base, adapters in traffic.base.items():
        hosts = [g for g, kind in enumerate(choice.groups) if base in kind.bases]
        spread = choice.spread.get(base, EVERYWHERE)
        if hosts and (spread != EVERYWHERE or any(a in choice.extra for a in adapters.tolist())):
            able = np.array([max(capacity[choice.groups[g], base].requests_per_s, 1e-9) for g in hosts])
            for adapter, places in _spread(traffic, adapters, able, spread, choice.extra):
                for position in places:
                    listed[hosts[position]][base].append((adapter, float(able[position] / able.max())))
    names = problem.arrivals.adapters
    groups = tuple(
        GroupPlan(
            name=f"g{index}",
            shape=kind.shape,
            gpu=kind.gpu,
            nodes=nodes[index],
            bases=tuple(
                BasePlacement(
                    base_model_id=base,
                    adapters=tuple(
                        AdapterShare(tenant=names[adapter].tenant, name=names[adapter].name, weight=weight)
                        for adapter, weight in sorted(listed[index][base])
                    ),
                )
                for base in kind.bases
            ),
        )
        for index, kind in enumerate(choice.groups)
    )
    return Plan(version=version, groups=groups)


def _spread(
    traffic: Traffic, adapters: IntArray, able: FloatArray, spread: float, extra: Mapping[int, int]
) -> Sequence[tuple[int, Sequence[int]]]:
    """(Adapter, positions of its groups). Adapters without a request in the trace are left to all."""
    load = np.zeros(len(able))
    found = []
    for adapter in adapters.tolist():
        rate = float(traffic.requests_per_s[adapter])
        if rate == 0:
            continue
        if spread == EVERYWHERE and adapter not in extra:
            load += rate * able / able.sum() / able
            continue
        count = len(able) if spread == EVERYWHERE else max(1, ceil(spread * rate / float(able.mean())))
        count = min(len(able), max(1, count + extra.get(adapter, 0)))
        chosen = np.argsort(load + rate / count / able, kind="stable")[:count]
        load[chosen] += rate / able[chosen].sum()
        found.append((adapter, sorted(chosen.tolist())))
    return found
