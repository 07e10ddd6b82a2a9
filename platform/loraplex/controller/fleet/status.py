"""What an administrator sees of the fleet. Pure."""

from collections.abc import Callable, Collection, Sequence

from loraplex.controller.fleet.desired import Desired
from loraplex.controller.fleet.match import matched
from loraplex.controller.fleet.placing import Placement
from loraplex.controller.fleet.state import Replica, RunningGroup, running_groups
from loraplex.core.plan import GroupPlan
from loraplex.core.rollout import FleetStatus, GroupState, GroupStatus, ReplicaStatus


def fleet_status(
    mode: str,
    desired: Desired,
    placement: Placement,
    replicas: Sequence[Replica],
    *,
    settled: bool,
    outdated: Collection[str],
    why: Callable[[GroupPlan], str],
    problem: str,
) -> FleetStatus:
    """``settled``: as was decided last. ``outdated``: names of groups of another release. ``why``: of the last failed
    start of such a group."""
    now = running_groups(replicas)
    found = matched(placement.groups, now, outdated)
    groups = [
        _planned(plan, found.get(index), left_out=index in placement.left_out, why=why(plan))
        for index, plan in enumerate(placement.groups)
    ]
    shown = {group.name for group in found.values()}
    groups += [_leaving(group) for group in now if group.name not in shown]
    return FleetStatus(
        mode=mode,
        active=desired.active,
        settled=settled and not desired.is_applying and not problem,
        groups=tuple(groups),
        problem=problem,
        num_outdated=sum(replica.target.group in outdated for replica in replicas),
    )


def _planned(plan: GroupPlan, found: RunningGroup | None, *, left_out: bool, why: str) -> GroupStatus:
    if found is not None and found.serves:
        state, reason = GroupState.SERVING, ""
    elif found is not None and found.stays:
        state, reason = GroupState.STARTING, why
    elif left_out:
        state, reason = GroupState.LEFT_OUT, "the nodes that are up have no GPUs for it"
    else:
        state, reason = GroupState.WAITING, why or "for GPUs that others hold"
    return GroupStatus(
        name=plan.name,
        group="" if found is None else found.name,
        bases=tuple(placed.base_model_id for placed in plan.bases),
        shape=plan.shape,
        gpu=plan.gpu,
        nodes=() if found is None else found.nodes,
        state=state,
        reason=reason,
        replicas=() if found is None else _replicas(found),
    )


def _leaving(group: RunningGroup) -> GroupStatus:
    return GroupStatus(
        name="",
        group=group.name,
        bases=tuple(sorted(group.bases)),
        shape=group.shape,
        gpu=group.gpu,
        nodes=group.nodes,
        state=GroupState.LEAVING,
        reason="the plan does not have it",
        replicas=_replicas(group),
    )


def _replicas(group: RunningGroup) -> tuple[ReplicaStatus, ...]:
    return tuple(
        ReplicaStatus(
            replica_id=member.target.replica_id,
            base_model_id=member.target.base_model_id,
            state=member.state.value,
            adapters=member.target.adapters,
        )
        for member in group.members
    )
