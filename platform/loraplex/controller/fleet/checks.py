"""Whether a plan can be this cluster's: one line that says why not. Pure."""

from collections.abc import Mapping, Sequence

from loraplex.controller.fleet.state import FleetBase, num_gpus
from loraplex.core.errors import InvalidInput
from loraplex.core.fleet import NodeStatus
from loraplex.core.ids import BaseModelId
from loraplex.core.plan import GroupPlan, Plan
from loraplex.core.plan_check import check_form, refused


def check_plan(
    plan: Plan, nodes: Sequence[NodeStatus], bases: Mapping[BaseModelId, FleetBase], *, may_grow: bool
) -> None:
    """``nodes``: all that were seen, up or not. ``may_grow``: more GPUs may come. Raises InvalidInput."""
    check_form(plan)
    for group in plan.groups:
        _check_bases(group, bases)
        _check_place(group, nodes, num_gpus((one.base_model_id for one in group.bases), bases))
    if not may_grow:
        _check_sum(plan, nodes, bases)


def _check_bases(group: GroupPlan, bases: Mapping[BaseModelId, FleetBase]) -> None:
    if not group.bases:
        raise refused(group, "it has no base")
    for placed in group.bases:
        if placed.base_model_id not in bases:
            raise refused(group, f"this cluster has no base {placed.base_model_id}: is the plan for another fleet?")


def _check_place(group: GroupPlan, nodes: Sequence[NodeStatus], per_rank: float) -> None:
    known = {node.name: node for node in nodes}
    for name in group.nodes:
        if name not in known:
            raise refused(group, f"this cluster has no node {name}: is the plan for another fleet?")
        if group.gpu and per_rank and known[name].gpu != group.gpu:
            raise refused(group, f"node {name} has {known[name].gpu or 'no named'} GPUs, not {group.gpu}")
    if group.gpu and per_rank and all(node.gpu != group.gpu for node in nodes):
        raise refused(group, f"this cluster has no GPU of type {group.gpu}: is the plan for another fleet?")


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
