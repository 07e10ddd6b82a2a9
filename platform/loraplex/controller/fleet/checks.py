"""Whether a plan can be this cluster's: one line that says why not. Pure."""

from collections.abc import Mapping, Sequence

from loraplex.controller.fleet.state import FleetBase, num_gpus
from loraplex.core.errors import BadConfig, InvalidInput
from loraplex.core.fleet import NodeStatus
from loraplex.core.ids import BaseModelId
from loraplex.core.plan import GroupPlan, Plan
from loraplex.core.plan_check import check_form, refused
from loraplex.core.shape_check import check_shape
from loraplex.cost.ceilings import ceilings_of, known_gpus
from loraplex.cost.memory import memory_model, shared_pages


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
        _check_shape(group, bases[placed.base_model_id])
    _check_memory(group, [bases[placed.base_model_id] for placed in group.bases])


def _check_shape(group: GroupPlan, base: FleetBase) -> None:
    if base.model is None:
        return
    try:
        check_shape(base.model, group.shape)
    except BadConfig as error:
        raise refused(group, error.message) from None


def _check_memory(group: GroupPlan, bases: Sequence[FleetBase]) -> None:
    """Each rank has memory for its part of the bases, where the type of its GPU is known."""
    if group.gpu not in known_gpus():
        return
    held = {
        base.base_model_id: memory_model(
            base.model,
            group.shape,
            gpu_bytes=ceilings_of(group.gpu).memory_bytes,
            itemsize=base.itemsize,
            memory_fraction=base.memory_fraction,
        )
        for base in bases
        if base.model is not None and base.gpus_per_rank
    }
    where = f"tp {group.shape.tp} x pp {group.shape.pp} GPUs of type {group.gpu}"
    for base_model_id, memory in held.items():
        if not memory.fits:
            raise refused(group, f"{base_model_id} does not fit on {where}")
    shares = [placed.arena_share for placed in group.bases if placed.base_model_id in held]
    if held and 0 in shared_pages(tuple(held.values()), shares):
        raise refused(group, f"{', '.join(held)} do not fit together on {where}")


def _check_place(group: GroupPlan, nodes: Sequence[NodeStatus], per_rank: float) -> None:
    known = {node.name: node for node in nodes}
    tp = group.shape.tp
    if any(len(set(group.nodes[first : first + tp])) > 1 for first in range(0, len(group.nodes), tp)):
        raise refused(group, f"the {tp} ranks of a stage must share a node")
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
