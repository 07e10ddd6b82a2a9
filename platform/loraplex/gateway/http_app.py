"""Puts the HTTP routes together: FastAPI inside, the edge outside. Called by ``Gateway``."""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI

from loraplex.core.control import ControlPlane
from loraplex.core.ids import GatewayId
from loraplex.gateway.activity import Activity
from loraplex.gateway.adapter_service import AdapterService
from loraplex.gateway.routes.activity import activity_routes
from loraplex.gateway.routes.adapters import adapter_routes
from loraplex.gateway.routes.edge import Edge
from loraplex.gateway.routes.errors import install_error_handlers
from loraplex.gateway.routes.generate import generation_routes
from loraplex.gateway.routes.models import model_routes
from loraplex.gateway.routes.plans import plan_routes
from loraplex.gateway.routes.system import ReplicaLoads, system_routes
from loraplex.gateway.routes.tenants import tenant_routes
from loraplex.gateway.service import GatewayService

_DESCRIPTION = """OpenAI-compatible endpoint for many tenants' LoRA adapters over shared base models.

Every `/v1/` path also works below `/t/{tenant}`, where it must agree with the key; an admin key acts for that tenant.
Every answer carries `x-request-id`."""


def build_http_app(
    service: GatewayService,
    adapters: AdapterService,
    control: ControlPlane,
    *,
    gateway_id: GatewayId,
    loads: ReplicaLoads | None,
    activity: Activity,
    num_queued: Callable[[], int],
    not_ready: Callable[[], str | None],
    observe: Callable[[], None],
) -> Edge:
    app = FastAPI(
        title="Loraplex",
        version="1",
        description=_DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        servers=[
            {"url": "/"},
            {"url": "/t/{tenant}", "variables": {"tenant": {"default": "default"}}},
        ],
    )
    app.include_router(generation_routes(service))
    app.include_router(model_routes(service))
    app.include_router(adapter_routes(adapters))
    app.include_router(tenant_routes(service, control))
    app.include_router(plan_routes(control))
    app.include_router(system_routes(service, gateway_id=gateway_id, loads=loads, not_ready=not_ready, observe=observe))
    app.include_router(activity_routes(activity, gateway_id=gateway_id, num_queued=num_queued))
    install_error_handlers(app)
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        return app.openapi_schema or _without_422(generate())

    app.openapi = openapi  # type: ignore[method-assign]
    return Edge(app, service)


def _without_422(schema: dict[str, Any]) -> dict[str, Any]:
    """FastAPI documents its own validation error everywhere; this API answers 400 instead."""
    for operations in schema["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)
    return schema
