"""One finished request as a trace keeps it. Filled by the gateway when the last byte of the answer is written."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRow:
    """One client request, whatever its end. With ``n`` > 1 the output tokens of all choices are summed."""

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
