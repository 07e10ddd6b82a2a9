"""A request as a trace tells of it: when a gateway has let it in, and as one row of the trace when it has ended."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivalRow:
    """A request whose end is still to come: load from now on. Its ``TraceRow`` has the same values in these fields, and
    ``arrival_s`` with ``request_id`` tells that it is the same request."""

    arrival_s: float
    tenant: str
    request_id: str
    base_model_id: str
    adapter_name: str | None
    prompt_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRow:
    """One client request, whatever its end; filled when the last byte of the answer is written. With ``n`` > 1 the
    output tokens of all choices are summed."""

    arrival_s: float
    """Wall clock (Unix seconds) at which the gateway read the request."""
    tenant: str
    request_id: str
    """The ``x-request-id`` of the answer."""
    endpoint: str
    """Such as ``chat.completions``, ``completions`` or ``grpc.generate``."""
    base_model_id: str | None
    """None: the request was refused before its model was known."""
    adapter_name: str | None = None
    """None, here and in the next two: the plain base."""
    adapter_version: int | None = None
    adapter_digest: str | None = None
    prompt_tokens: int
    """0: it was refused before it was let in, such as for its tenant's quota."""
    cached_tokens: int = 0
    """Prompt tokens that came from the prefix cache."""
    output_tokens: int
    ttft_s: float | None = None
    """Seconds from arrival to the first token; None when none was sent."""
    e2e_s: float
    """Seconds from arrival to the end of the answer."""
    tpot_s: float | None = None
    """(e2e - ttft) / (output_tokens - 1); None with fewer than two tokens."""
    status: int
    """HTTP status, also for gRPC (mapped)."""
    finish_reason: str | None = None
    replica_id: str | None = None
    """The replica that finished it; None when none was reached."""
    priority: str = "online"
    stream: bool
