"""A generation as a client asked for it, before models, tokens and limits are known. HTTP and gRPC both build these."""

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

from loraplex.core.clock import Clock
from loraplex.core.request import Priority

_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}")


def request_id_of(offered: str | None) -> str:
    """The client's own when it is a sane token, else a fresh one."""
    if offered is not None and _SANE_REQUEST_ID.fullmatch(offered):
        return offered
    return f"req-{secrets.token_hex(12)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CallInfo:
    """One call to the gateway, of any kind."""

    request_id: str
    """Echoed to the client as ``x-request-id``."""
    arrival_s: float
    """Wall clock."""
    arrival_monotonic_s: float
    traceparent: str | None = None
    """The caller's W3C trace context, as it came."""

    @classmethod
    def begin(cls, request_id: str, clock: Clock, *, traceparent: str | None = None) -> "CallInfo":
        return cls(
            request_id=request_id,
            arrival_s=clock.wall_s(),
            arrival_monotonic_s=clock.monotonic_s(),
            traceparent=traceparent,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPrompt:
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPrompt:
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    messages: tuple[ChatMessage, ...]


Prompt = TextPrompt | TokenPrompt | ChatPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """As written by the client; None where it said nothing. Ranges are checked in ``checks.py``."""

    max_tokens: int | None = None
    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[str, float] = field(default_factory=dict)
    """Keys are token ids in decimal, as JSON has them."""
    min_tokens: int | None = None
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    num_logprobs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateCall:
    endpoint: str
    """For metrics and traces: ``chat.completions``, ``completions`` or ``grpc.generate``."""
    model: str
    prompts: tuple[Prompt, ...]
    options: SamplingOptions
    default_max_tokens: int | None = None
    """Used when the options name no ``max_tokens``; None means all that the context has left."""
    max_logprobs: int
    """Largest ``num_logprobs`` of this endpoint."""
    priority: Priority = Priority.ONLINE
    stream: bool = False
    echo: bool = False
