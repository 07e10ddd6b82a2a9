"""From groups to a plan: which adapters each group lists, on which nodes it lies. Deterministic.

A group takes all adapters of its bases, or those of its set, or, with a spread, those that fall to it: the busiest
first go to the groups with the least load for what they can serve, a hot one to several. Called by ``scoring``,
``search`` and ``baselines``.
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

AdapterSet = frozenset[int]
"""Indices into the trace's adapters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a search decides; ``to_plan`` does the rest."""

    groups: tuple[Kind, ...]
    spread: Mapping[BaseModelId, float] = field(default_factory=dict)
    """By base, over its groups without a set: groups for an adapter that asks for a group's whole capacity;
    ``EVERYWHERE`` (the default): each takes all."""
    sets: tuple[AdapterSet | None, ...] = ()
    """Of each group; None, or no sets at all: it takes every adapter of its bases. Groups with equal sets share their
    traffic."""

    def set_of(self, group: int) -> AdapterSet | None:
        return self.sets[group] if self.sets else None

    def key(self) -> object:
        """Equal for equal choices."""
        return self.groups, self.sets, tuple(sorted(self.spread.items()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Of each adapter, as the plan sees it."""

    requests_per_s: FloatArray
    """[A]"""
    base: Mapping[BaseModelId, IntArray]
    """Its adapters, busiest first."""
    prompt_tokens: FloatArray
    """[A] mean; 0 without requests. Like the next."""
    output_tokens: FloatArray

    @classmethod
    def of(cls, problem: Problem) -> "Traffic":
        arrivals = problem.arrivals
        size = len(arrivals.adapters)
        chosen = arrivals.adapter >= 0
        rows = arrivals.adapter[chosen]
        counts = np.bincount(rows, minlength=size)
        span_s = max(float(arrivals.arrival_s[-1] - arrivals.arrival_s[0]), 1e-9)
        order = np.argsort(-counts, kind="stable")
        bases = np.array([adapter.base_model or "" for adapter in arrivals.adapters], dtype=object)
        return cls(
            requests_per_s=counts / span_s,
            base={base: order[bases[order] == base].astype(np.int32) for base in problem.bases},
            prompt_tokens=np.bincount(rows, arrivals.prompt_tokens[chosen], size) / np.maximum(counts, 1),
            output_tokens=np.bincount(rows, arrivals.output_tokens[chosen], size) / np.maximum(counts, 1),
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
    return Plan(version=version, groups=packed(problem, traffic, capacity, choice, nodes))


def packed(
    problem: Problem,
    traffic: Traffic,
    capacity: Mapping[tuple[Kind, BaseModelId], Capacity],
    choice: Choice,
    nodes: Sequence[tuple[str, ...]],
) -> tuple[GroupPlan, ...]:
    """``nodes``: of each group's ranks."""
    listed: list[dict[BaseModelId, list[tuple[int, float]]]] = [{base: [] for base in k.bases} for k in choice.groups]
    for base, adapters in traffic.base.items():
        hosts = [g for g, kind in enumerate(choice.groups) if base in kind.bases]
        for group, adapter, weight in _listed(traffic, capacity, choice, base, adapters, hosts):
            listed[group][base].append((adapter, weight))
    names = problem.arrivals.adapters
    return tuple(
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


def _listed(
    traffic: Traffic,
    capacity: Mapping[tuple[Kind, BaseModelId], Capacity],
    choice: Choice,
    base: BaseModelId,
    adapters: IntArray,
    hosts: Sequence[int],
) -> list[tuple[int, int, float]]:
    """(Group, adapter, weight); an adapter that is on no list may go to every group of its base."""
    spread = choice.spread.get(base, EVERYWHERE)
    sets = {group: choice.set_of(group) for group in hosts}
    open_hosts = [group for group in hosts if sets[group] is None]
    if not hosts or (len(open_hosts) == len(hosts) and spread == EVERYWHERE):
        return []
    able = {group: max(capacity[choice.groups[group], base].requests_per_s, 1e-9) for group in hosts}
    most = {members: max(able[group] for group in hosts if sets[group] == members) for members in sets.values()}
    if spread == EVERYWHERE:
        return [
            (group, adapter, able[group] / most[members])
            for group, members in sets.items()
            for adapter in adapters.tolist()
            if members is None or adapter in members
        ]
    found = [
        (group, adapter, able[group] / most[members])
        for group, members in sets.items()
        if members is not None
        for adapter in adapters.tolist()
        if adapter in members
    ]
    if open_hosts:
        of_open = np.array([able[group] for group in open_hosts])
        for adapter, places in _spread(traffic, adapters, of_open, spread):
            found += [(open_hosts[place], adapter, float(of_open[place] / most[None])) for place in places]
    return found


def _spread(
    traffic: Traffic, adapters: IntArray, able: FloatArray, spread: float
) -> Sequence[tuple[int, Sequence[int]]]:
    """(Adapter, positions of its groups). Adapters without a request in the trace are left to all."""
    load = np.zeros(len(able))
    found = []
    for adapter in adapters.tolist():
        rate = float(traffic.requests_per_s[adapter])
        if rate == 0:
            continue
        count = min(len(able), max(1, ceil(spread * rate / float(able.mean()))))
        chosen = np.argsort(load + rate / count / able, kind="stable")[:count]
        load[chosen] += rate / able[chosen].sum()
        found.append((adapter, sorted(chosen.tolist())))
    return found
