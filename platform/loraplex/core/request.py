"""A generation as engine, router and wire see it: token ids in, token ids out. Text exists only in the gateway."""

from dataclasses import dataclass
from enum import StrEnum

import msgspec

from loraplex.core.adapter import AdapterRef
from loraplex.core.ids import BaseModelId, RequestId, TenantName


class Priority(StrEnum):
    ONLINE = "online"
    OFFLINE = "offline"


class FinishReason(StrEnum):
    STOP = "stop"
    """An end-of-sequence or stop token."""
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Checked by the gateway; the engine trusts them. Ranges are those of the OpenAI API, plus top_k, min_p and
    repetition_penalty as in vLLM and transformers.

    Token i of a request is drawn from one uniform number that depends on (seed, i) alone, so that a request continues
    identically after preemption or migration.
    """

    max_tokens: int
    """Generated tokens at most, counted over the whole request also after a resume."""
    seed: int
    """Always set: the gateway draws one when the client gives none. 0 <= seed < 2**63."""
    temperature: float = 1.0
    """0 means greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 means all."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    """Over prompt and output tokens; the two above count output tokens only."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    """No end-of-sequence or stop token before this many generated tokens."""
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    num_logprobs: int | None = None
    """None: no logprobs. k >= 0: the chosen token's and the k most likely ones'."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    request_id: RequestId
    tenant: TenantName
    base_model_id: BaseModelId
    adapter: AdapterRef | None
    """None: the plain base."""
    prompt_token_ids: tuple[int, ...]
    """At least one token."""
    sampling: SamplingParams
    arrival_s: float
    """Wall clock at the gateway."""
    cache_salt: str
    """Seeds the prefix-cache hash chain; requests of different salts never share KV."""
    priority: Priority = Priority.ONLINE
    deadline_s: float | None = None
    """Wall clock by which the first token is due."""
    weight: float = 1.0
    """Of its tenant among those that compete; greater than 0."""
    resumed_token_ids: tuple[int, ...] = ()
    """Tokens generated elsewhere before a migration; they count as output and are not sent again."""
    traceparent: str | None = None
    """W3C trace context of the span that this belongs to; None: it is not traced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    token_id: int
    logprob: float


class OutputToken(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A struct for its speed, as ``RequestOutput``: one is made for each token."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()
    """Most likely first; empty unless asked for."""


class RequestOutput(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What one step (or one refusal) adds to one request."""

    request_id: RequestId
    tokens: tuple[OutputToken, ...] = ()
    finish_reason: FinishReason | None = None
    """Set exactly once, on the last output of a request."""
    num_cached_tokens: int = 0
    """Prompt tokens that came from the prefix cache; set on the first output."""
    error: str | None = None
    """With FinishReason.ERROR: a sentence that the tenant may read."""
    error_code: str | None = None
    """With ``error``: the ``class_code`` of the LoraplexError, for ``errors.error_from_code``; None from a replica that
    does not tell."""
