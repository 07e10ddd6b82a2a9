"""/health, /ready, /metrics for machines, and GET /v1/status for the administrator."""

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from loraplex.core.errors import Unavailable
from loraplex.core.ids import GatewayId, ReplicaId
from loraplex.core.tenant import Role
from loraplex.core.wire import LoadReport
from loraplex.gateway.routes import replies
from loraplex.gateway.routes.access import Caller
from loraplex.gateway.routes.edge import bearer_key
from loraplex.gateway.routes.json_reply import json_reply
from loraplex.gateway.service import GatewayService
from loraplex.telemetry.exposition import CONTENT_TYPE

ReplicaLoads = Callable[[], Mapping[ReplicaId, LoadReport]]
"""Last load report of each connected replica."""


def system_routes(
    service: GatewayService,
    *,
    gateway_id: GatewayId,
    loads: ReplicaLoads | None,
    not_ready: Callable[[], str | None],
    observe: Callable[[], None],
) -> APIRouter:
    """``not_ready``: why the gateway cannot serve yet, None when it can. ``observe`` brings the metrics up to date."""
    router = APIRouter()

    @router.get("/health", tags=["system"], response_model=replies.HealthReply)
    async def health() -> Response:
        return json_reply({"status": "ok"})

    unready: dict[int | str, dict[str, Any]] = {503: replies.ERRORS[503]}

    @router.get("/ready", tags=["system"], response_model=replies.HealthReply, responses=unready)
    async def ready() -> Response:
        reason = not_ready()
        if reason is not None:
            raise Unavailable(reason, code="not_ready")
        return json_reply({"status": "ok"})

    @router.get("/metrics", tags=["system"], response_model=None, responses={200: {"content": {CONTENT_TYPE: {}}}})
    async def metrics(request: Request) -> Response:
        """Open to all; names tenants and adapters only to the administrator."""
        observe()
        per_tenant = False
        key = bearer_key(request.headers.get("authorization"), request.headers.get("x-api-key"))
        if key is not None:
            per_tenant = service.authenticate(key).role is Role.ADMIN
        return Response(service.metrics.render(per_tenant=per_tenant), headers={"content-type": CONTENT_TYPE})

    @router.get("/v1/status", tags=["administration"], response_model=replies.StatusReply, responses=replies.ERRORS)
    async def status(caller: Caller) -> Response:
        caller.require_admin()
        snapshot = service.view.directory.snapshot
        known = None if loads is None else loads()
        replicas = [
            {
                "id": route.replica_id,
                "base_model": route.base_model_id,
                "address": route.address,
                "group": route.group,
                "shape": {"tp": route.shape.tp, "pp": route.shape.pp},
                "gpu": route.gpu,
                "draining": route.draining,
                "num_planned_adapters": len(route.adapters),
                "connected": known is None or route.replica_id in known,
                "load": msgspec.to_builtins(known[route.replica_id]) if known and route.replica_id in known else None,
            }
            for route in snapshot.routes
        ]
        return json_reply(
            {
                "object": "status",
                "gateway": gateway_id,
                "epoch": snapshot.epoch,
                "version": snapshot.version,
                "num_tenants": len(snapshot.tenants),
                "num_adapters": sum(adapter.current for adapter in snapshot.adapters),
                "num_adapter_versions": len(snapshot.adapters),
                "base_models": [base.base_model_id for base in snapshot.base_models],
                "replicas": replicas,
            }
        )

    return router
