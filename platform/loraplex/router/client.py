"""One gateway's stream to one replica: connects, says hello, sends and receives frames, and connects again.

Knows no requests; what was under way when a stream broke is the router's to resubmit. Lives on the gateway's event
loop. ``ReplicaClient`` is the seam that tests and other carriers fill.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Protocol

import grpc
import msgspec

from loraplex.core.ids import GatewayId, RequestId
from loraplex.core.request import EngineRequest
from loraplex.core.wire import SECRET_METADATA_KEY, STREAM_METHOD, GatewayFrame, Hello, ReplicaFrame, encode
from loraplex.core.wire import decode_replica_frame as decode
from loraplex.router.config import RouterConfig

_log = logging.getLogger(__name__)

_LOOKS = 6
"""Within the silence after which a replica is given up."""
_FRAME_BYTES = 5 << 20
"""Of requests that share a frame, about a million token ids. A replica ends the stream, with all that runs on it, at a
frame above ``ReplicaConfig.max_frame_bytes``."""


class ReplicaListener(Protocol):
    """Called on the event loop, never concurrently."""

    def on_frame(self, frame: ReplicaFrame) -> None:
        """The first frame after a (re)connection has ``replica`` set: the replica is up."""

    def on_down(self, reason: str) -> None:
        """The stream broke, or could not be opened. The client goes on trying."""


class ReplicaClient(Protocol):
    def send(self, submits: tuple[EngineRequest, ...], aborts: tuple[RequestId, ...]) -> None:
        """Does not block. What is sent while the stream is down is lost, as is what was not yet received."""

    async def close(self) -> None:
        """Ends the stream, after which the listener is not called any more. Idempotent."""


class GrpcReplicaClient:
    def __init__(
        self,
        address: str,
        *,
        gateway_id: GatewayId,
        cluster_secret: Callable[[], str],
        listener: ReplicaListener,
        config: RouterConfig,
    ) -> None:
        """Starts to connect at once; needs a running event loop. ``address``: host:port."""
        self._address = address
        self._gateway_id = gateway_id
        self._cluster_secret = cluster_secret
        self._listener = listener
        self._config = config
        self._submits: list[EngineRequest] = []
        self._aborts: list[RequestId] = []
        self._pending = asyncio.Event()
        self._received = False
        self._heard = False
        """Since the watch looked last."""
        self._heartbeat_s = 0.0
        self._silent_s = 0.0
        """After which the stream was given up; 0: it was not."""
        self._task = asyncio.create_task(self._run(), name=f"replica {address}")

    def send(self, submits: tuple[EngineRequest, ...], aborts: tuple[RequestId, ...]) -> None:
        self._submits.extend(submits)
        self._aborts.extend(aborts)
        self._pending.set()

    async def close(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        pause_s = self._config.reconnect_min_s
        while True:
            self._received = False
            reason = await self._connect_once()
            self._submits.clear()
            self._aborts.clear()
            if self._received:
                pause_s = self._config.reconnect_min_s
            _log.warning("stream to replica at %s is down: %s", self._address, reason)
            self._listener.on_down(reason)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, self._config.reconnect_max_s)

    async def _connect_once(self) -> str:
        """Holds one stream until it breaks; returns why."""
        # More often the replica's server would not have it.
        keepalive_ms = max(1000, int(self._config.silence_s * 1000))
        options = (
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            ("grpc.keepalive_time_ms", keepalive_ms),
            ("grpc.keepalive_timeout_ms", keepalive_ms),
            ("grpc.http2.max_pings_without_data", 0),
            # Its own connection: otherwise gRPC's own back-off, shared by all channels to the address, comes on top.
            ("grpc.use_local_subchannel_pool", 1),
        )
        async with grpc.aio.insecure_channel(self._address, options=options) as channel:
            method = channel.stream_stream(STREAM_METHOD, request_serializer=bytes, response_deserializer=bytes)
            call = method(None, metadata=((SECRET_METADATA_KEY, self._cluster_secret()),))
            tasks: list[asyncio.Task[None]] = []
            self._heartbeat_s = self._silent_s = 0.0
            try:
                await call.write(encode(GatewayFrame(hello=Hello(gateway_id=self._gateway_id))))
                tasks = [asyncio.create_task(self._write(call)), asyncio.create_task(self._watch(call))]
                while isinstance(data := await call.read(), bytes):
                    frame = decode(data)
                    self._received = self._heard = True
                    if frame.replica is not None:
                        self._heartbeat_s = frame.replica.heartbeat_s
                    self._listener.on_frame(frame)
                return f"the replica ended the stream: {(await call.code()).name} {await call.details()}".rstrip()
            except asyncio.CancelledError:
                # The call was cancelled by the watch, or this task by ``close``, or both: then ``close`` counts.
                own = asyncio.current_task()
                if not self._silent_s or (own is not None and own.cancelling()):
                    raise
                return f"nothing was heard of the replica for {self._silent_s:.1f} s"
            except grpc.aio.AioRpcError as error:
                return f"{error.code().name}: {error.details()}"
            except msgspec.MsgspecError as error:
                return f"not a replica frame: {error}"
            except Exception as error:
                # A bug of ours: without a new stream and a resubmission, what runs there would wait for ever.
                _log.exception("the stream to replica at %s failed", self._address)
                return f"{type(error).__name__}: {error}"
            finally:
                call.cancel()
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _write(self, call: grpc.aio.StreamStreamCall[bytes, bytes]) -> None:
        # A failed write ends the call as well, and the reader tells why.
        while True:
            await self._pending.wait()
            self._pending.clear()
            if self._submits or self._aborts:
                submits, aborts = tuple(self._submits), tuple(self._aborts)
                self._submits.clear()
                self._aborts.clear()
                for frame in frames_of(submits, aborts):
                    await call.write(encode(frame))

    async def _watch(self, call: grpc.aio.StreamStreamCall[bytes, bytes]) -> None:
        """Gives the stream up when the replica was silent. Looks are counted, not seconds: while this event loop is
        held up, nobody looks, and what came meanwhile is read before the next look."""
        looks = 0
        while looks < _LOOKS:
            limit_s = max(self._config.silence_s, 3 * self._heartbeat_s)
            await asyncio.sleep(limit_s / _LOOKS)
            looks = 0 if self._heard or not self._heartbeat_s else looks + 1
            self._heard = False
        self._silent_s = limit_s
        call.cancel()


def frames_of(submits: tuple[EngineRequest, ...], aborts: tuple[RequestId, ...]) -> Iterator[GatewayFrame]:
    """Frames of at most ``_FRAME_BYTES`` of requests each, or of one request that alone has more. The aborts are in the
    last one, as they may be of requests in the others."""
    first = num_bytes = 0
    for index, request in enumerate(submits):
        more = _max_bytes(request)
        if index > first and num_bytes + more > _FRAME_BYTES:
            yield GatewayFrame(submits=submits[first:index])
            first, num_bytes = index, 0
        num_bytes += more
    yield GatewayFrame(submits=submits[first:], aborts=aborts)


def _max_bytes(request: EngineRequest) -> int:
    """Bound of its size in a frame: 5 bytes a token id, 15 an entry of ``logit_bias``, and what names take."""
    sampling = request.sampling
    num_ids = len(request.prompt_token_ids) + len(request.resumed_token_ids) + len(sampling.stop_token_ids)
    return 5 * num_ids + 15 * len(sampling.logit_bias) + 2048
