"""Which running group becomes which group of the plan: by GPUs, shape, bases and adapters, never by name. Pure.

A group that is *outdated* (its replicas were started by another build or config) is a stopgap: it is taken where there
is no other, and not taken back when it drains.
"""

import math
from collections.abc import Collection, Sequence

from loraplex.controller.fleet.state import AdapterKey, ReplicaState, RunningGroup, adapter_keys, base_shares
from loraplex.core.fleet import BaseShare
from loraplex.core.ids import BaseModelId
from loraplex.core.plan import GroupPlan


def matched(
    wanted: Sequence[GroupPlan], running: Sequence[RunningGroup], outdated: Collection[str] = ()
) -> dict[int, RunningGroup]:
    """Index into ``wanted`` -> its group. ``outdated`` names come last. Groups that serve come before those that
    start, and these before those that drain; then those with the most adapters in common."""
    pairs = sorted(
        (
            (
                group.name in outdated,
                _rank(group),
                not _on_its_nodes(plan, group),
                -_num_common(plan, group),
                index,
                place,
            )
            for index, plan in enumerate(wanted)
            for place, group in enumerate(running)
            if may_become(group, plan) and not (group.drains and group.name in outdated)
        ),
    )
    found: dict[int, RunningGroup] = {}
    taken: set[int] = set()
    for *_, index, place in pairs:
        if index not in found and place not in taken:
            found[index] = running[place]
            taken.add(place)
    return found


def may_become(group: RunningGroup, plan: GroupPlan) -> bool:
    """Without a restart: it differs in its adapters alone."""
    return (
        (group.stays or group.drains)
        and group.shape == plan.shape
        and group.bases == {placed.base_model_id for placed in plan.bases}
        and _shares_alike(plan, group)
        and (not plan.gpu or not group.gpu or group.gpu == plan.gpu)
        and (_on_its_nodes(plan, group) or sorted(group.first.planned_nodes) == sorted(plan.nodes))
    )


def _on_its_nodes(plan: GroupPlan, group: RunningGroup) -> bool:
    return not plan.nodes or not group.nodes or sorted(group.nodes) == sorted(plan.nodes)


def _shares_alike(plan: GroupPlan, group: RunningGroup) -> bool:
    """Its bases have the parts of the arena that the plan says, as far as is known."""
    planned, had = _parts(base_shares(plan)), _parts(group.base_shares)
    return not had or all(math.isclose(planned[base], part) for base, part in had.items())


def _parts(shares: Sequence[BaseShare]) -> dict[BaseModelId, float]:
    whole = sum(share.arena_share for share in shares)
    return {share.base_model_id: share.arena_share / whole for share in shares}


def _rank(group: RunningGroup) -> int:
    if group.drains:
        return 2
    return 0 if any(member.state is ReplicaState.SERVING for member in group.members) else 1


def _num_common(plan: GroupPlan, group: RunningGroup) -> int:
    return len(_planned(plan) & _routed(group))


def _planned(plan: GroupPlan) -> set[tuple[BaseModelId, AdapterKey]]:
    return {(placed.base_model_id, key) for placed in plan.bases for key in adapter_keys(placed.adapters)}


def _routed(group: RunningGroup) -> set[tuple[BaseModelId, AdapterKey]]:
    return {
        (member.target.base_model_id, key) for member in group.members for key in adapter_keys(member.target.adapters)
    }
