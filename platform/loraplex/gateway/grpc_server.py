"""A grpc.aio server around the servicer, with reflection and the standard health service.

For direct access to the gateway; behind Ray Serve's proxy the servicer is called without it.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from loraplex.core.errors import LoraplexError, Unavailable
from loraplex.gateway.grpc_api import LoraplexServicer
from loraplex.gateway.proto import loraplex_v1_pb2 as pb
from loraplex.gateway.proto import loraplex_v1_pb2_grpc
from loraplex.gateway.status import status_of

SERVICE = pb.DESCRIPTOR.services_by_name["Loraplex"].full_name
_HEALTH_PERIOD_S = 1.0


class _AioServicer(loraplex_v1_pb2_grpc.LoraplexServicer):  # type: ignore[misc] # generated code is untyped
    """Ends failed calls as the servicer wrote into the context, without the traceback that grpc.aio would log."""

    def __init__(self, inner: LoraplexServicer) -> None:
        for name in ("ListModels", "RegisterAdapter", "ListAdapters", "RollbackAdapter", "DeleteAdapter"):
            setattr(self, name, _ending_unary(getattr(inner, name)))
        self._inner = inner

    async def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: Any
    ) -> AsyncIterator[pb.GenerateResponse]:
        try:
            async for response in self._inner.Generate(request, context):
                yield response
        except LoraplexError as error:
            await _abort(context, error)


def _ending_unary(method: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    async def call(request: Any, context: Any) -> Any:
        try:
            return await method(request, context)
        except LoraplexError as error:
            return await _abort(context, error)

    return call


async def _abort(context: Any, error: LoraplexError) -> None:
    await context.abort(status_of(error).grpc, error.message, context.trailing_metadata())


class GrpcServer:
    """Owns the server and the health state."""

    def __init__(self, servicer: LoraplexServicer, *, not_ready: Callable[[], str | None]) -> None:
        """``not_ready``: why the gateway cannot serve now, None when it can; health follows it."""
        self._not_ready = not_ready
        self._server = aio.server(options=(("grpc.so_reuseport", 0),))
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined] # not in the stubs
        self._watching: asyncio.Task[None] | None = None
        loraplex_v1_pb2_grpc.add_LoraplexServicer_to_server(_AioServicer(servicer), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def start(self, address: str) -> int:
        """Listens on ``host:port`` (port 0: any) and returns the port. Raises Unavailable when it is taken."""
        try:
            port: int = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise Unavailable(f"{address}: the gRPC port cannot be used: {error}") from error
        await self._update_health()
        await self._server.start()
        self._watching = asyncio.create_task(self._watch())
        return port

    async def stop(self, *, grace_s: float = 2.0) -> None:
        """Running calls have ``grace_s`` to end."""
        if self._watching is not None:
            self._watching.cancel()
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_HEALTH_PERIOD_S)
            await self._update_health()

    async def _update_health(self) -> None:
        serving = health_pb2.HealthCheckResponse.SERVING
        status = serving if self._not_ready() is None else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", SERVICE):
            await self._health.set(name, status)
