"""The gateway as a Serve ingress: one ``loraplex.gateway.Gateway`` per Serve replica, behind Serve's proxies.

Serve calls this class: ASGI messages go to the gateway's HTTP app, gRPC methods by name to its servicer. It knows
nothing of tenants or tokens.
"""

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from loraplex.config.platform import PlatformConfig
from loraplex.core.control import ControlPlane
from loraplex.core.errors import LoraplexError, NotFound
from loraplex.core.ids import BaseModelId, GatewayId
from loraplex.core.switching import switch_often
from loraplex.gateway.gateway import Gateway
from loraplex.gateway.proto import loraplex_v1_pb2 as pb
from loraplex.router.router import Router
from loraplex.telemetry.logs import configure_logging
from loraplex.telemetry.tracing import open_tracing
from loraplex.traces.recorder import TraceRecorder
from ray import serve
from ray.serve.grpc_util import RayServegRPCContext
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraplex_deployments.control_client import RayControlPlane, controller_handle
from loraplex_deployments.gateway_header import GATEWAY_HEADER

logger = logging.getLogger(__name__)

APP_NAME = "loraplex"
SERVICE_NAME = "loraplex.v1.Loraplex"
_HEALTH_PERIOD_S = 1.0
MAX_REFUSALS = 256
"""Calls that Serve passes on to a gateway beyond ``serve.max_ongoing_requests``. Serve lets what is more wait unheard;
the gateway refuses at once."""
GRPC_SERVICERS = (
    "loraplex.gateway.proto.loraplex_v1_pb2_grpc.add_LoraplexServicer_to_server",
    "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server",
)


def behind_serve(app: ASGIApp, gateway_id: GatewayId) -> ASGIApp:
    """Tells in every response which gateway answered, and leaves ``x-request-id`` to Serve's HTTP proxy: it passes its
    own on to us, which we take over, and appends it to every response, so that ours would be a second one."""
    ours = (GATEWAY_HEADER.encode(), gateway_id.encode())

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [header for header in message.get("headers", ()) if header[0].lower() != b"x-request-id"]
                message = {**message, "headers": [*headers, ours]}
            await send(message)

        await app(scope, receive, send_without_id)

    return wrapped


@serve.deployment(name="gateway")
@serve.ingress()
class GatewayDeployment:
    async def __init__(self, config: PlatformConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        switch_often()
        configure_logging(config.telemetry.logs)
        gateway_id = self._gateway_id = GatewayId(f"gateway-{uuid.uuid4().hex[:8]}")
        control = RayControlPlane(controller_handle())
        self._waking: set[asyncio.Task[None]] = set()
        self._tracing = open_tracing(config.telemetry.tracing, service="gateway", instance=gateway_id)
        self._router = Router(
            gateway_id=gateway_id,
            config=config.router,
            on_unserved=partial(self._wake_in_background, control),
            tracing=self._tracing,
        )
        self._recorder = TraceRecorder(config.traces, send=partial(self._send_traces, control, gateway_id))
        self._gateway = Gateway(
            config.gateway,
            gateway_id=gateway_id,
            control=control,
            dispatcher=self._router,
            tracer=self._recorder,
            tenancy=config.tenancy,
            telemetry=config.telemetry,
            tracing=self._tracing,
            on_routes=self._router.update,
            loads=self._router.loads,
            num_queued=self._router.num_queued,
            max_open_calls=config.serve.max_ongoing_requests,
        )
        self._grpc = self._gateway.grpc_servicer
        await self._recorder.start()
        await self._gateway.start()

    def _wake_in_background(self, control: RayControlPlane, base_model_id: BaseModelId) -> None:
        task = asyncio.create_task(self._wake(control, base_model_id))
        self._waking.add(task)
        task.add_done_callback(self._waking.discard)

    async def _wake(self, control: RayControlPlane, base_model_id: BaseModelId) -> None:
        try:
            await control.wake_base(base_model_id)
        except LoraplexError as error:
            # The router asks again as long as requests wait.
            logger.warning("base %s could not be woken: %s", base_model_id, error.message)

    async def _send_traces(self, control: ControlPlane, gateway_id: GatewayId, batch: bytes) -> None:
        self._gateway.metrics.trace_store(await control.record_traces(gateway_id, batch))

    def __serve_build_asgi_app__(self) -> Any:
        return behind_serve(self._gateway.http_app, self._gateway_id)

    async def __del__(self) -> None:
        await self._gateway.stop()
        await self._router.close()
        await self._recorder.close()
        await asyncio.to_thread(self._tracing.close)

    # The gRPC methods, by name, as Serve's proxy calls them.

    async def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        async for response in self._grpc.Generate(request, grpc_context):
            yield response

    async def ListModels(  # noqa: N802
        self, request: pb.ListModelsRequest, grpc_context: RayServegRPCContext
    ) -> pb.ListModelsResponse:
        return await self._grpc.ListModels(request, grpc_context)

    async def RegisterAdapter(  # noqa: N802
        self, requests: AsyncIterator[pb.RegisterAdapterRequest], grpc_context: RayServegRPCContext
    ) -> pb.Adapter:
        return await self._grpc.RegisterAdapter(requests, grpc_context)

    async def ListAdapters(  # noqa: N802
        self, request: pb.ListAdaptersRequest, grpc_context: RayServegRPCContext
    ) -> pb.ListAdaptersResponse:
        return await self._grpc.ListAdapters(request, grpc_context)

    async def RollbackAdapter(  # noqa: N802
        self, request: pb.RollbackAdapterRequest, grpc_context: RayServegRPCContext
    ) -> pb.Adapter:
        return await self._grpc.RollbackAdapter(request, grpc_context)

    async def DeleteAdapter(  # noqa: N802
        self, request: pb.DeleteAdapterRequest, grpc_context: RayServegRPCContext
    ) -> pb.DeleteAdapterResponse:
        return await self._grpc.DeleteAdapter(request, grpc_context)

    # The standard health service; Serve's proxy has reflection of its own.

    async def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, grpc_context: RayServegRPCContext
    ) -> health_pb2.HealthCheckResponse:
        return health_pb2.HealthCheckResponse(status=self._health(request.service, grpc_context))

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, grpc_context: RayServegRPCContext
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        last = None
        while True:
            status = self._health(request.service, grpc_context)
            if status != last:
                yield health_pb2.HealthCheckResponse(status=status)
                last = status
            await asyncio.sleep(_HEALTH_PERIOD_S)

    def _health(self, service: str, context: RayServegRPCContext) -> int:
        if service not in ("", SERVICE_NAME):
            context.set_code(grpc.StatusCode.NOT_FOUND)
            raise NotFound(f"unknown service {service!r}")
        status = health_pb2.HealthCheckResponse
        return int(status.NOT_SERVING if self._gateway.not_ready() else status.SERVING)
