"""Schemas of what the routes of plans answer. They document the API; handlers encode the same shapes themselves."""

from typing import Any, Literal

from pydantic import BaseModel

from loraplex.core.rollout import DecisionKind, GroupState, PlanState
from loraplex.gateway.routes.replies import ShapeReply


class PlanReply(BaseModel):
    object: Literal["plan"]
    version: int
    source: str
    state: PlanState
    created: int
    reason: str
    plan: dict[str, Any]
    """As ``loraplex plan`` writes it."""


class PlanList(BaseModel):
    object: Literal["list"]
    data: list[PlanReply]


class DecisionReply(BaseModel):
    object: Literal["decision"]
    number: int
    at_s: float
    kind: DecisionKind
    plan_version: int
    reason: str
    attainment_before: float | None
    predicted_gain: float | None
    attainment_after: float | None


class DecisionList(BaseModel):
    object: Literal["list"]
    data: list[DecisionReply]


class PlannedAdapterReply(BaseModel):
    tenant: str | None
    name: str
    weight: float


class PlannedReplicaReply(BaseModel):
    replica_id: str
    base_model_id: str
    state: str
    adapters: list[PlannedAdapterReply]


class GroupReply(BaseModel):
    name: str
    group: str
    bases: list[str]
    shape: ShapeReply
    gpu: str
    nodes: list[str]
    state: GroupState
    reason: str
    replicas: list[PlannedReplicaReply]


class FleetReply(BaseModel):
    object: Literal["fleet"]
    mode: str
    active: PlanReply
    settled: bool
    num_outdated: int
    groups: list[GroupReply]
    problem: str
