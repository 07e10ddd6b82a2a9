"""/v1/plans, /v1/decisions and /v1/fleet: what should run, what was decided, what runs. For the admin role only."""

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from loraplex.core.control import ControlPlane
from loraplex.core.errors import InvalidInput
from loraplex.core.plan import Plan
from loraplex.core.rollout import PlanRecord
from loraplex.gateway.routes import plan_replies, replies
from loraplex.gateway.routes.access import Caller
from loraplex.gateway.routes.json_reply import json_list, json_reply

Version = Annotated[int, Field(ge=0, le=2**31)]
Limit = Annotated[int, Query(ge=1, le=1000)]


class ApplyRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    plan: dict[str, Any]
    """As ``loraplex plan`` writes it."""
    renumber: bool = False
    """Give it the next version, whatever it says."""


class RollbackRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    version: Version | None = None
    """Of an older plan; null: the one before. 0: the config's own."""


def plan_reply(record: PlanRecord) -> dict[str, Any]:
    """Shaped as ``plan_replies.PlanReply``."""
    return {
        "object": "plan",
        "version": record.plan.version,
        "source": record.source,
        "state": record.state.value,
        "created": int(record.created_s),
        "reason": record.reason,
        "plan": msgspec.to_builtins(record.plan),
    }


async def _require_admin(caller: Caller) -> None:
    caller.require_admin()


def plan_routes(control: ControlPlane) -> APIRouter:
    router = APIRouter(
        prefix="/v1",
        tags=["administration"],
        responses=replies.CHANGE_ERRORS,
        dependencies=[Depends(_require_admin)],
    )

    @router.get("/fleet", response_model=plan_replies.FleetReply)
    async def fleet() -> Response:
        """The plan in force, group by group, and what is on its way."""
        status = await control.fleet_status()
        return json_reply(
            {
                "object": "fleet",
                "mode": status.mode,
                "active": plan_reply(status.active),
                "settled": status.settled,
                "num_outdated": status.num_outdated,
                "groups": msgspec.to_builtins(status.groups),
                "problem": status.problem,
            }
        )

    @router.get("/plans", response_model=plan_replies.PlanList)
    async def list_plans(limit: Limit = 100) -> Response:
        """Newest first."""
        return json_list([plan_reply(record) for record in await control.plan_history(limit)])

    @router.post("/plans", status_code=201, response_model=plan_replies.PlanReply)
    async def apply(body: ApplyRequest) -> Response:
        """Put a plan in force. The cluster gets there without dropping a request; ``/v1/fleet`` tells how far it is."""
        try:
            plan = msgspec.convert(body.plan, Plan)
        except msgspec.ValidationError as error:
            raise InvalidInput(f"not a plan: {error}", param="plan") from error
        return json_reply(plan_reply(await control.apply_plan(plan, renumber=body.renumber)), status=201)

    @router.post("/plans/rollback", status_code=201, response_model=plan_replies.PlanReply)
    async def rollback(body: RollbackRequest) -> Response:
        return json_reply(plan_reply(await control.rollback_plan(body.version)), status=201)

    @router.get("/plans/active", response_model=plan_replies.PlanReply)
    async def active() -> Response:
        """With its adapters where they are meant to be now."""
        return json_reply(plan_reply(await control.plan_record(None)))

    @router.get("/plans/{version:int}", response_model=plan_replies.PlanReply)
    async def get_plan(version: Version) -> Response:
        return json_reply(plan_reply(await control.plan_record(version)))

    @router.post("/plans/{version:int}/accept", status_code=201, response_model=plan_replies.PlanReply)
    async def accept(version: Version) -> Response:
        """Put a proposal of the planner in force."""
        return json_reply(plan_reply(await control.accept_plan(version)), status=201)

    @router.get("/decisions", response_model=plan_replies.DecisionList)
    async def decisions(limit: Limit = 100) -> Response:
        """Newest first."""
        found = await control.decisions(limit)
        return json_list([{"object": "decision", **msgspec.to_builtins(decision)} for decision in found])

    return router
