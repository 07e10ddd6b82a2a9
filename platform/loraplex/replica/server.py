"""The replica's edge: one bidirectional stream per gateway over grpc.aio, frames of ``core.wire`` in both directions.

Checks the cluster secret, gives each stream a session of the engine loop, and ends the session with the stream. Knows
nothing of tokens or pages; built by the deployment.
"""

import asyncio
import contextlib
import hmac
import itertools
import logging
from collections.abc import AsyncIterator, Callable

import grpc
import msgspec

from loraplex.core.errors import BadConfig
from loraplex.core.ids import GatewayId
from loraplex.core.wire import (
    PROTOCOL_VERSION,
    SECRET_METADATA_KEY,
    STREAM_METHOD,
    Hello,
    ReplicaFrame,
    decode_gateway_frame,
    encode,
)
from loraplex.replica.config import ReplicaConfig
from loraplex.replica.engine_loop import EngineLoop
from loraplex.replica.outbox import Outbox

_log = logging.getLogger(__name__)

_Requests = AsyncIterator[bytes]
_Context = grpc.aio.ServicerContext[bytes, bytes]


class ReplicaServer:
    def __init__(self, loop: EngineLoop, *, cluster_secret: str, config: ReplicaConfig | None = None) -> None:
        self._loop = loop
        self._config = config or ReplicaConfig()
        self._secret = cluster_secret.encode()
        self._session_ids = itertools.count(1)
        self._outboxes: dict[int, Outbox] = {}
        self._session_of_gateway: dict[GatewayId, int] = {}
        self._loop_ended = asyncio.Event()
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._server: grpc.aio.Server | None = None

    async def start(self, host: str) -> int:
        """Listens on ``host`` and returns the port. The engine loop may be running or not. Raises BadConfig."""
        self._event_loop = asyncio.get_running_loop()
        self._loop.connect(self._deliver, on_end=self._on_loop_end)
        keepalive_ms = int(self._config.keepalive_s * 1000)
        self._server = grpc.aio.server(
            options=(
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", self._config.max_frame_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.keepalive_time_ms", keepalive_ms),
                ("grpc.keepalive_timeout_ms", keepalive_ms),
                ("grpc.http2.max_pings_without_data", 0),
                ("grpc.http2.min_ping_interval_without_data_ms", 1000),
            )
        )
        service, method = STREAM_METHOD.strip("/").split("/")
        handler = grpc.stream_stream_rpc_method_handler(self._stream)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        try:
            port = self._server.add_insecure_port(f"{host}:{self._config.port}")
        except RuntimeError:
            raise BadConfig(f"replica.port: {host}:{self._config.port} cannot be bound", param="port") from None
        await self._server.start()
        return int(port)

    async def stop(self) -> None:
        """No new work, running requests finish within ``stop_grace_s``, then streams and engine end. Idempotent."""
        if self._loop.alive:
            self._loop.drain()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._loop_ended.wait(), self._config.stop_grace_s)
        self._loop.stop()
        self._end_streams()
        if self._server is not None:
            await self._server.stop(grace=1.0)

    async def _stream(self, requests: _Requests, context: _Context) -> None:
        await self._authenticate(context)
        hello = await self._read_hello(requests, context)
        session = self._open(hello.gateway_id)
        outbox = self._outboxes[session]
        parts = (
            asyncio.create_task(self._read_frames(requests, session)),
            asyncio.create_task(self._write_frames(outbox, context)),
            # A gateway that reads nothing holds the writer up for ever: a closed outbox ends the stream by itself.
            asyncio.create_task(outbox.wait_closed()),
        )
        try:
            await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._close(session, hello.gateway_id)
            for part in parts:
                part.cancel()
            results = await asyncio.gather(*parts, return_exceptions=True)
        for error in results:
            if isinstance(error, msgspec.MsgspecError):
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not a gateway frame")
            elif isinstance(error, Exception):
                raise error
        if outbox.closed:
            context.set_code(grpc.StatusCode.ABORTED)
            context.set_details("cut off: frames were not taken, or the gateway came back")

    async def _authenticate(self, context: _Context) -> None:
        given = dict(context.invocation_metadata() or ()).get(SECRET_METADATA_KEY, "")
        if not hmac.compare_digest(given.encode() if isinstance(given, str) else given, self._secret):
            _log.warning("a stream from %s was refused: wrong cluster secret", context.peer())
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong cluster secret")

    async def _read_hello(self, requests: _Requests, context: _Context) -> Hello:
        hello: Hello | None = None
        with contextlib.suppress(msgspec.MsgspecError, StopAsyncIteration):
            hello = decode_gateway_frame(await anext(requests)).hello
        if hello is None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first frame must say hello")
        elif hello.protocol_version != PROTOCOL_VERSION:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"this replica speaks protocol {PROTOCOL_VERSION}, the gateway {hello.protocol_version}",
            )
        assert hello is not None, "abort ends the call"
        return hello

    async def _read_frames(self, requests: _Requests, session: int) -> None:
        async for data in requests:
            frame = decode_gateway_frame(data)
            if frame.submits:
                self._loop.submit(session, frame.submits)
            if frame.aborts:
                self._loop.abort(session, frame.aborts)

    async def _write_frames(self, outbox: Outbox, context: _Context) -> None:
        while True:
            try:
                async with asyncio.timeout(self._config.heartbeat_s):
                    frame = await outbox.take()
            except TimeoutError:
                frame = ReplicaFrame()
            if frame is None:
                return
            await context.write(encode(frame))

    def _open(self, gateway_id: GatewayId) -> int:
        before = self._session_of_gateway.get(gateway_id)
        if before is not None:
            # The gateway came back before its old stream was seen to be broken: its requests may carry the same ids.
            self._outboxes[before].close()
            self._loop.close_session(before)
        session = next(self._session_ids)
        self._session_of_gateway[gateway_id] = session
        self._outboxes[session] = Outbox(max_unsent_tokens=self._config.max_unsent_tokens)
        self._loop.open_session(session)
        if self._loop_ended.is_set():
            self._outboxes[session].end()
        return session

    def _close(self, session: int, gateway_id: GatewayId) -> None:
        self._loop.close_session(session)
        del self._outboxes[session]
        if self._session_of_gateway.get(gateway_id) == session:
            del self._session_of_gateway[gateway_id]

    def _deliver(self, frames: dict[int, ReplicaFrame]) -> None:
        self._call_soon(lambda: self._put(frames))

    def _put(self, frames: dict[int, ReplicaFrame]) -> None:
        for session, frame in frames.items():
            outbox = self._outboxes.get(session)
            if outbox is not None:
                outbox.put(frame)

    def _on_loop_end(self) -> None:
        self._call_soon(self._end_streams)

    def _end_streams(self) -> None:
        self._loop_ended.set()
        for outbox in self._outboxes.values():
            outbox.end()

    def _call_soon(self, callback: Callable[[], None]) -> None:
        """From the engine's thread; nothing happens when the event loop has ended already."""
        assert self._event_loop is not None, "the server was not started"
        try:
            self._event_loop.call_soon_threadsafe(callback)
        except RuntimeError:
            if not self._event_loop.is_closed():
                raise
