"""Whether a plan can be this cluster's: one line that says why not. Pure."""

from collections import Counter
from collections.abc import Mapping, Sequence

from loraplex.controller.fleet.state import FleetBase, num_gpus
from loraplex.core.errors import InvalidInput
from loraplex.core.fleet import NodeStatus
from loraplex.core.ids import BaseModelId
from loraplex.core.plan import GroupPlan, Plan


def check_plan(
    plan: Plan, nodes: Sequence[NodeStatus], bases: Mapping[BaseModelId, FleetBase], *, may_grow: bool
) -> None:
    """``nodes``: all that were seen, up or not. ``may_grow``: more GPUs may come. Raises InvalidInput."""
    names = Counter(group.name for group in plan.groups)
    for group in plan.groups:
        if names[group.name] > 1 or not group.name:
            raise _refused(group, "its name is empty or comes twice")
        _check_bases(group, bases)
        _check_place(group, nodes, num_gpus((one.base_model_id for one in group.bases), bases))
    if not may_grow:
        _check_sum(plan, nodes, bases)


def _check_bases(group: GroupPlan, bases: Mapping[BaseModelId, FleetBase]) -> None:
    counts = Counter(placed.base_model_id for placed in group.bases)
    if not counts:
        raise _refused(group, "it has no base")
    for base, count in counts.items():
        if base not in bases:
            raise _refused(group, f"this cluster has no base {base}: is the plan for another fleet?")
        if count > 1:
            raise _refused(group, f"base {base} comes twice")
    for placed in group.bases:
        shares = Counter((share.tenant, share.name) for share in placed.adapters)
        for share in placed.adapters:
            if not share.weight > 0:
                raise _refused(group, f"adapter {share.name}: weight {share.weight} is not above 0")
            if shares[share.tenant, share.name] > 1:
                raise _refused(group, f"adapter {share.name} comes twice on base {placed.base_model_id}")


def _check_place(group: GroupPlan, nodes: Sequence[NodeStatus], per_rank: float) -> None:
    if group.shape.tp < 1 or group.shape.pp < 1:
        raise _refused(group, f"shape tp{group.shape.tp} pp{group.shape.pp} is none")
    if group.nodes and len(group.nodes) != group.shape.num_ranks:
        raise _refused(group, f"{len(group.nodes)} nodes for {group.shape.num_ranks} ranks")
    known = {node.name: node for node in nodes}
    for name in group.nodes:
        if name not in known:
            raise _refused(group, f"this cluster has no node {name}: is the plan for another fleet?")
        if group.gpu and per_rank and known[name].gpu != group.gpu:
            raise _refused(group, f"node {name} has {known[name].gpu or 'no named'} GPUs, not {group.gpu}")
    if group.gpu and per_rank and all(node.gpu != group.gpu for node in nodes):
        raise _refused(group, f"this cluster has no GPU of type {group.gpu}: is the plan for another fleet?")


def _check_sum(plan: Plan, nodes: Sequence[NodeStatus], bases: Mapping[BaseModelId, FleetBase]) -> None:
    for gpu in ("", *dict.fromkeys(group.gpu for group in plan.groups if group.gpu)):
        there = sum(node.num_gpus for node in nodes if not gpu or node.gpu == gpu)
        wanted = sum(
            group.shape.num_ranks * num_gpus((one.base_model_id for one in group.bases), bases)
            for group in plan.groups
            if not gpu or group.gpu == gpu
        )
        if wanted > there + 1e-6:
            kind = f" of type {gpu}" if gpu else ""
            raise InvalidInput(f"the plan needs {wanted:g} GPUs{kind}, this cluster has {there}", param="plan")


def _refused(group: GroupPlan, why: str) -> InvalidInput:
    return InvalidInput(f"group {group.name or '?'}: {why}", param="plan")
