"""What no plan may say, whatever the machines: one line that names the group. Called by the planner's fleet file and by
the controller, which each add what they know of their machines."""

import math
from collections import Counter

from loraplex.core.errors import InvalidInput
from loraplex.core.plan import BasePlacement, GroupPlan, Plan


def check_form(plan: Plan) -> None:
    """Raises InvalidInput."""
    names = Counter(group.name for group in plan.groups)
    for group in plan.groups:
        if names[group.name] > 1 or not group.name:
            raise refused(group, "its name is empty or comes twice")
        if group.shape.tp < 1 or group.shape.pp < 1:
            raise refused(group, f"shape tp{group.shape.tp} pp{group.shape.pp} is none")
        if group.nodes and len(group.nodes) != group.shape.num_ranks:
            raise refused(group, f"{len(group.nodes)} nodes for {group.shape.num_ranks} ranks")
        counts = Counter(placed.base_model_id for placed in group.bases)
        for placed in group.bases:
            if counts[placed.base_model_id] > 1:
                raise refused(group, f"base {placed.base_model_id} comes twice")
            _check_placement(group, placed)


def refused(group: GroupPlan, why: str) -> InvalidInput:
    return InvalidInput(f"group {group.name or '?'}: {why}", param="plan")


def _check_placement(group: GroupPlan, placed: BasePlacement) -> None:
    if not (placed.arena_share > 0 and math.isfinite(placed.arena_share)):
        raise refused(group, f"base {placed.base_model_id}: arena share {placed.arena_share} is not above 0")
    shares = Counter((share.tenant, share.name) for share in placed.adapters)
    for share in placed.adapters:
        if not (share.weight > 0 and math.isfinite(share.weight)):
            raise refused(group, f"adapter {share.name}: weight {share.weight} is not above 0")
        if shares[share.tenant, share.name] > 1:
            raise refused(group, f"adapter {share.name} comes twice on base {placed.base_model_id}")
