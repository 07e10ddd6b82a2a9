"""Moves adapters among running replicas by what they are asked for now. Pure; no group changes.

The fast loop of the controller: of each base, the replica with the most requests per GPU gives an adapter away, or
shares it with the one that has the fewest; an adapter that was spread and has grown cold goes home. Bases whose plan
names no adapters are left alone: there every replica takes every adapter.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from loraplex.core.ids import BaseModelId
from loraplex.core.plan import AdapterShare, Plan

_UNEVEN = 1.25
"""A replica with less than so many times the mean load is left in peace."""
_QUIET = 1e-3
"""So is one with fewer requests per second and GPU: nothing that moves would be noticed."""
_GAIN = 0.1
"""Part of the fullest replica's load that a change must take away."""
_COLD = 0.1
"""Part of the mean load under which an adapter needs no second home."""
_MAX_CHANGES = 4
"""Of one base at a time: each is a load of an adapter."""

Rates = Mapping[tuple[BaseModelId, str | None, str], float]


@dataclass(slots=True)
class _Home:
    """One base on one group."""

    group: int
    name: str
    num_gpus: int
    shares: dict[tuple[str | None, str], AdapterShare]


def reassigned(planned: Plan, now: Plan, rates: Rates) -> tuple[Plan, tuple[str, ...]]:
    """``now`` with other adapter sets, and what was changed, a line each; ``planned``: as it was before anything moved.
    ``rates``: requests per second."""
    bases = dict.fromkeys(placed.base_model_id for group in now.groups for placed in group.bases)
    lines: list[str] = []
    for base in bases:
        homes = _homes(now, base)
        if len(homes) < 2 or not any(home.shares for home in homes):
            continue
        changes = [*_sent_home(base, homes, _homes(planned, base), rates), *_evened(base, homes, rates)]
        if changes:
            lines += changes
            now = _with(now, base, homes)
    return now, tuple(lines)


def _homes(plan: Plan, base: BaseModelId) -> list[_Home]:
    return [
        _Home(
            index, group.name, group.shape.num_ranks, {(share.tenant, share.name): share for share in placed.adapters}
        )
        for index, group in enumerate(plan.groups)
        for placed in group.bases
        if placed.base_model_id == base
    ]


def _loads(base: BaseModelId, homes: list[_Home], rates: Rates) -> list[float]:
    """Requests per second and GPU."""
    loads = [0.0] * len(homes)
    for (of_base, tenant, name), rate in rates.items():
        if of_base != base:
            continue
        weights = [share.weight if (share := home.shares.get((tenant, name))) else 0.0 for home in homes]
        if not any(weights):
            weights = [float(home.num_gpus) for home in homes]
        for index, weight in enumerate(weights):
            loads[index] += rate * weight / sum(weights) / homes[index].num_gpus
    return loads


def _sent_home(base: BaseModelId, homes: list[_Home], planned: list[_Home], rates: Rates) -> list[str]:
    loads = _loads(base, homes, rates)
    mean = sum(loads) / len(loads)
    lines = []
    for home, before in zip(homes, planned, strict=True):
        for key in list(home.shares.keys() - before.shares.keys()):
            others = [other for other in homes if other is not home and key in other.shares]
            rate = rates.get((base, *key), 0.0)
            if others and rate < _COLD * mean:
                del home.shares[key]
                lines.append(f"{_name(key)} is cold ({rate:.2g}/s) and leaves {home.name}")
    return lines


def _evened(base: BaseModelId, homes: list[_Home], rates: Rates) -> list[str]:
    lines: list[str] = []
    for _ in range(_MAX_CHANGES):
        loads = _loads(base, homes, rates)
        mean = sum(loads) / len(loads)
        fullest = max(range(len(homes)), key=lambda index: loads[index])
        emptiest = min(range(len(homes)), key=lambda index: loads[index])
        if loads[fullest] <= max(_UNEVEN * mean, _QUIET):
            break
        best: tuple[float, str, dict[int, dict[tuple[str | None, str], AdapterShare]]] | None = None
        for key, share in homes[fullest].shares.items():
            if key in homes[emptiest].shares:
                continue
            for word, stays in (("moves", False), ("spreads", True)):
                changed = {
                    fullest: {one: s for one, s in homes[fullest].shares.items() if stays or one != key},
                    emptiest: {**homes[emptiest].shares, key: share},
                }
                tried = [replace(home, shares=changed.get(index, home.shares)) for index, home in enumerate(homes)]
                worst = max(_loads(base, tried, rates))
                if best is None or worst < best[0] - 1e-9:
                    line = f"{_name(key)} {word} from {homes[fullest].name} to {homes[emptiest].name}"
                    best = worst, line, changed
        if best is None or best[0] > loads[fullest] * (1 - _GAIN):
            break
        lines.append(
            f"{best[1]}: the fullest replica of {base} goes from {loads[fullest]:.2g} to {best[0]:.2g}/s a GPU"
        )
        for index, shares in best[2].items():
            homes[index].shares = shares
    return lines


def _with(plan: Plan, base: BaseModelId, homes: list[_Home]) -> Plan:
    shares = {home.group: tuple(home.shares.values()) for home in homes}
    groups = tuple(
        replace(
            group,
            bases=tuple(
                replace(placed, adapters=shares[index]) if placed.base_model_id == base else placed
                for placed in group.bases
            ),
        )
        for index, group in enumerate(plan.groups)
    )
    return replace(plan, groups=groups)


def _name(key: tuple[str | None, str]) -> str:
    tenant, name = key
    return name if tenant is None else f"{tenant}/{name}"
