"""Messages on the one bidirectional stream per (gateway, replica) pair, and their encoding (msgpack).

A gateway opens the stream and sends Hello first; the replica answers with a frame whose ``replica`` is set. After
that each side sends frames at will; a replica sends at most one frame per engine step and gateway. Unknown fields are
ignored and new ones get defaults, so that neighbouring versions understand each other.
"""

from dataclasses import dataclass

import msgspec

from loraplex.core.ids import BaseModelId, Digest, GatewayId, ReplicaId, RequestId
from loraplex.core.request import EngineRequest, RequestOutput

PROTOCOL_VERSION = 1
STREAM_METHOD = "/loraplex.internal.Replica/Stream"
SECRET_METADATA_KEY = "loraplex-cluster-secret"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    gateway_id: GatewayId
    protocol_version: int = PROTOCOL_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayFrame:
    hello: Hello | None = None
    submits: tuple[EngineRequest, ...] = ()
    aborts: tuple[RequestId, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaInfo:
    replica_id: ReplicaId
    base_model_id: BaseModelId
    max_context_tokens: int
    num_pages: int
    page_size: int
    max_running: int = 0
    """Requests that compute at the same time; 0 from a replica that does not tell."""
    max_step_tokens: int = 0
    """Of one step, prompts and decoding together; 0 likewise."""
    heartbeat_s: float = 0.0
    """A frame comes at least this often as long as the replica lives; 0 from a replica that does not promise it."""
    protocol_version: int = PROTOCOL_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """State of a replica after a step; routers read it."""

    num_running: int = 0
    num_waiting: int = 0
    num_pages: int = 0
    """Of the arena; 0 from a replica that does not tell."""
    num_free_pages: int = 0
    """Free or reclaimable at once (cached prefixes, idle adapters)."""
    num_queued_tokens: int = 0
    """Prompt tokens not yet prefilled."""
    credits: int = 0
    """Requests that the replica is ready to take from this gateway now, beyond the ``num_received`` that it has got."""
    num_received: int | None = None
    """Requests of this stream that the replica had seen when it counted ``credits``, refused ones too; what was sent
    beyond it is still on its way and takes a credit each. None from a replica that does not count: the router then
    takes a report for the answer to all that it sent before."""
    steps: int = 0
    generated_tokens: int = 0
    busy_s: float = 0.0
    """Spent in ``steps``; 0 from a replica that does not tell."""
    prefilled_tokens: int = 0
    """Prompt tokens that are through, computed or found in the prefix cache."""
    adapter_loads: int = 0
    """Copies of adapters to the accelerator that an admitted request waited for."""
    adapter_prefetches: int = 0
    """Copies begun before the turn of the request that they were for."""
    adapter_hits: int = 0
    """Admissions that found their adapter on the accelerator, or on its way there."""
    cached_tokens: int = 0
    """Prompt tokens that were found in the prefix cache."""
    preemptions: int = 0
    """Running requests that gave their pages to others."""
    resident_adapters: tuple[Digest, ...] | None = None
    """On the accelerator; None means unchanged since the last frame."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaFrame:
    replica: ReplicaInfo | None = None
    outputs: tuple[RequestOutput, ...] = ()
    load: LoadReport | None = None


_encoder = msgspec.msgpack.Encoder()
_gateway_decoder = msgspec.msgpack.Decoder(GatewayFrame)
_replica_decoder = msgspec.msgpack.Decoder(ReplicaFrame)


def encode(frame: GatewayFrame | ReplicaFrame) -> bytes:
    return _encoder.encode(frame)


def decode_gateway_frame(data: bytes) -> GatewayFrame:
    """Raises msgspec.ValidationError or DecodeError on anything else than a GatewayFrame."""
    return _gateway_decoder.decode(data)


def decode_replica_frame(data: bytes) -> ReplicaFrame:
    """Raises msgspec.ValidationError or DecodeError on anything else than a ReplicaFrame."""
    return _replica_decoder.decode(data)
