"""What it costs to go from one plan to another: bytes over links, and the time that GPUs serve nothing. Pure.

A group that stays (same nodes, GPU type and shape) loads only the bases that it did not have; adapters load while it
serves. Called by ``scoring`` and the command ``plan diff``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from loraplex.core.errors import InvalidInput
from loraplex.core.ids import BaseModelId
from loraplex.core.plan import GroupPlan, Plan
from loraplex.cost.loads import Tier
from loraplex.cost.memory import whole_adapter_bytes
from loraplex.simulator.types import AdapterSize, CostKey, ReplicaCost


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupMove:
    group: str
    """Name in the new plan."""
    was: str
    """Name in the old one; empty: its GPUs were cut otherwise."""
    weight_bytes: int
    """Per GPU."""
    adapter_bytes: int
    """Whole adapters that it lists newly."""
    stopped_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    groups: tuple[GroupMove, ...]
    """Those that change."""
    weight_bytes: int
    """Over all GPUs."""
    adapter_bytes: int
    lost_gpu_s: float
    """GPU seconds in which nothing is served: weights come from host memory, then KV is gone."""


SizeOf = Callable[[BaseModelId, str | None, str], AdapterSize | None]
"""Of an adapter of (base, tenant, name); None: not known, counts nothing."""


def move_between(costs: Mapping[CostKey, ReplicaCost], size_of: SizeOf, old: Plan, new: Plan) -> Move:
    """InvalidInput naming a group of ``new`` whose base has no cost there."""
    pairs = _paired(old, new)
    moves = []
    weights = adapters = 0
    lost_gpu_s = 0.0
    for group, before in pairs:
        had = {placed.base_model_id: placed for placed in before.bases} if before else {}
        weight_bytes = adapter_bytes = 0
        load_s = 0.0
        for placed in group.bases:
            cost = costs.get(CostKey(gpu=group.gpu, base_model_id=placed.base_model_id, shape=group.shape))
            if cost is None:
                raise InvalidInput(f"group {group.name}: no cost of {placed.base_model_id} in its shape", param="plan")
            if placed.base_model_id not in had:
                weight_bytes += cost.memory.weight_bytes
                load_s += cost.loads.seconds(cost.memory.weight_bytes, Tier.HOST)
                known: set[tuple[str | None, str]] = set()
            else:
                known = {(share.tenant, share.name) for share in had[placed.base_model_id].adapters}
            for share in placed.adapters:
                size = size_of(placed.base_model_id, share.tenant, share.name)
                if size is not None and (share.tenant, share.name) not in known:
                    adapter_bytes += whole_adapter_bytes(
                        cost.model, size.lora_rank, size.modules, itemsize=cost.itemsize
                    )
        dropped = before is not None and any(base not in {p.base_model_id for p in group.bases} for base in had)
        if weight_bytes or adapter_bytes or before is None or dropped:
            moves.append(
                GroupMove(
                    group=group.name,
                    was=before.name if before else "",
                    weight_bytes=weight_bytes,
                    adapter_bytes=adapter_bytes,
                    stopped_s=load_s,
                )
            )
        weights += weight_bytes * group.shape.num_ranks
        adapters += adapter_bytes
        lost_gpu_s += load_s * group.shape.num_ranks
    return Move(groups=tuple(moves), weight_bytes=weights, adapter_bytes=adapters, lost_gpu_s=lost_gpu_s)


def _paired(old: Plan, new: Plan) -> list[tuple[GroupPlan, GroupPlan | None]]:
    """Each new group with an old one on GPUs like its own: one with the same bases and the most adapters in common
    first, then any other."""
    free = [True] * len(old.groups)
    found: dict[int, GroupPlan | None] = dict.fromkeys(range(len(new.groups)))
    for same_bases in (True, False):
        for index, group in enumerate(new.groups):
            if found[index] is not None:
                continue
            alike = [
                place
                for place, before in enumerate(old.groups)
                if free[place]
                and (before.gpu, before.shape) == (group.gpu, group.shape)
                and (before.nodes == group.nodes or not before.nodes or not group.nodes)
                and (not same_bases or _bases(before) == _bases(group))
            ]
            if alike:
                best = max(alike, key=lambda place: (len(_names(old.groups[place]) & _names(group)), -place))
                found[index], free[best] = old.groups[best], False
    return [(group, found[index]) for index, group in enumerate(new.groups)]


def _bases(group: GroupPlan) -> frozenset[str]:
    return frozenset(placed.base_model_id for placed in group.bases)


def _names(group: GroupPlan) -> set[tuple[str, str | None, str]]:
    return {(placed.base_model_id, share.tenant, share.name) for placed in group.bases for share in placed.adapters}
