"""Schemas of what the routes answer. They document the API; handlers encode the same shapes themselves."""

from typing import Any, Literal

from pydantic import BaseModel


class ErrorInfo(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    error: ErrorInfo


class UsageDetails(BaseModel):
    cached_tokens: int


class UsageReply(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: UsageDetails


class TopLogprobReply(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobReply(TopLogprobReply):
    top_logprobs: list[TopLogprobReply]


class ChatLogprobsReply(BaseModel):
    content: list[TokenLogprobReply]
    refusal: None


class MessageReply(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoiceReply(BaseModel):
    index: int
    message: MessageReply
    logprobs: ChatLogprobsReply | None
    finish_reason: Literal["stop", "length"]


class ChatCompletionReply(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoiceReply]
    usage: UsageReply


class CompletionLogprobsReply(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoiceReply(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobsReply | None
    finish_reason: Literal["stop", "length"]


class CompletionReply(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoiceReply]
    usage: UsageReply


class ModelReply(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelReply]


class AdapterReply(BaseModel):
    id: str
    object: Literal["adapter"]
    name: str
    version: int
    digest: str
    base_model: str
    lora_rank: int
    bytes: int
    created: int
    current: bool


class AdapterList(BaseModel):
    object: Literal["list"]
    data: list[AdapterReply]


class DeletedReply(BaseModel):
    id: str
    object: str
    deleted: bool


class LimitsReply(BaseModel):
    requests_per_minute: int | None
    tokens_per_minute: int | None
    max_concurrent_requests: int | None
    max_adapters: int | None
    max_adapter_bytes: int | None
    weight: int | None


class TenantReply(BaseModel):
    id: str
    object: Literal["tenant"]
    name: str
    limits: LimitsReply
    num_adapters: int
    adapter_bytes: int


class TenantList(BaseModel):
    object: Literal["list"]
    data: list[TenantReply]


class KeyReply(BaseModel):
    id: str
    object: Literal["key"]
    tenant: str
    role: str
    created: int


class NewKeyReply(KeyReply):
    key: str
    """Shown this once."""


class KeyList(BaseModel):
    object: Literal["list"]
    data: list[KeyReply]


class TenantUsageReply(BaseModel):
    object: Literal["usage"]
    tenant: str
    requests: int
    prompt_tokens: int
    output_tokens: int


class ShapeReply(BaseModel):
    tp: int
    pp: int


class ReplicaReply(BaseModel):
    id: str
    base_model: str
    address: str
    group: str
    """Of the plan; replicas of one group share its GPUs. Empty: there is no plan."""
    shape: ShapeReply
    gpu: str
    draining: bool
    num_planned_adapters: int
    connected: bool
    load: dict[str, Any] | None


class StatusReply(BaseModel):
    object: Literal["status"]
    gateway: str
    epoch: int
    version: int
    num_tenants: int
    num_adapters: int
    num_adapter_versions: int
    base_models: list[str]
    replicas: list[ReplicaReply]


class ServedReply(BaseModel):
    requests: int
    errors: int
    good: int
    prompt_tokens: int
    output_tokens: int
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    tpot_p50_s: float | None
    tpot_p99_s: float | None


class TenantActivityReply(BaseModel):
    tenant: str
    served: ServedReply


class AdapterActivityReply(BaseModel):
    tenant: str
    name: str
    base_model: str | None
    digest: str
    served: ServedReply


class ActivityReply(BaseModel):
    object: Literal["activity"]
    gateway: str
    queued: int
    """Generations that wait in this gateway for a replica."""
    window_s: float
    total: ServedReply
    tenants: list[TenantActivityReply]
    adapters: list[AdapterActivityReply]


class HealthReply(BaseModel):
    status: Literal["ok"]


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply, "description": description}
    for status, description in (
        (400, "The request is wrong; `param` names the field."),
        (401, "No API key, or an unknown one."),
        (403, "The key has not the right."),
        (404, "It does not exist, or the key may not see it."),
        (413, "The body is too large."),
        (429, "A limit of the tenant, or no replica can serve in time; see `retry-after`."),
        (500, "The server failed."),
        (503, "A needed part is away; see `retry-after`."),
    )
}

CHANGE_ERRORS: dict[int | str, dict[str, Any]] = {
    **ERRORS,
    409: {"model": ErrorReply, "description": "The name exists, or the state forbids it."},
    507: {"model": ErrorReply, "description": "The store is full."},
}
