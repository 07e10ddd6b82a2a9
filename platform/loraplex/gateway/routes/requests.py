"""Bodies that clients send to the generation routes, as pydantic models, and their translation to a GenerateCall.

Unknown fields are accepted, as OpenAI's clients send many that mean nothing here (``user``, ``metadata``, ``store``).
Fields that would change the answer and are not supported are refused by name. Every list fails at its first wrong
element (``fail_fast``): a body of millions of them would otherwise make as many errors.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from loraplex.core.errors import InvalidInput
from loraplex.core.request import Priority
from loraplex.gateway.call import (
    ChatMessage,
    ChatPrompt,
    GenerateCall,
    Prompt,
    SamplingOptions,
    TextPrompt,
    TokenPrompt,
)
from loraplex.gateway.checks import check_num_biases
from loraplex.gateway.config import GatewayConfig

_INT32 = 2**31 - 1
Number = Annotated[float, Field(allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0, le=_INT32)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


def _with_few_entries(logit_bias: Any) -> Any:
    """``logit_bias`` itself. Raises InvalidInput, which pydantic lets through."""
    if isinstance(logit_bias, dict):
        check_num_biases(len(logit_bias))
    return logit_bias


# pydantic has no ``fail_fast`` for a dict: its size is checked before its entries.
LogitBias = Annotated[
    dict[str, Annotated[Number, Field(ge=-100, le=100)]],
    BeforeValidator(_with_few_entries),
]

_NEUTRAL: dict[str, tuple[object, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "suffix": ("",),
    "use_beam_search": (False,),
    "prompt_logprobs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "prompt_embeds": (),
}
"""Fields that would change the answer and are not supported, each with the values that ask for nothing."""


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None


class SamplingFields(BaseModel):
    """What chat and text completions share."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: Annotated[str, Field(min_length=1, max_length=512)]
    max_tokens: Annotated[int, Field(ge=1, le=_INT32)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_INT32)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=10)] | None = None
    logit_bias: LogitBias | None = None
    min_tokens: Annotated[int, Field(ge=0, le=_INT32)] | None = None
    ignore_eos: bool | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Literal["online", "offline"] | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def refuse_unsupported(self) -> None:
        """Raises InvalidInput naming the field."""
        for name, value in (self.model_extra or {}).items():
            neutral = _NEUTRAL.get(name)
            if neutral is not None and value is not None and value not in neutral:
                raise InvalidInput(f"'{name}' is not supported.", param=name, code="unsupported_parameter")
        if self.stream_options is not None and not self.stream:
            raise InvalidInput("'stream_options' is only allowed when 'stream' is true.", param="stream_options")

    def options(self, *, max_tokens: int | None, num_logprobs: int | None) -> SamplingOptions:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return SamplingOptions(
            max_tokens=max_tokens,
            n=1 if self.n is None else self.n,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=self.logit_bias or {},
            min_tokens=self.min_tokens,
            ignore_eos=bool(self.ignore_eos),
            stop=stop,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            seed=self.seed,
            num_logprobs=num_logprobs,
        )

    def call_priority(self) -> Priority:
        return Priority(self.priority or Priority.ONLINE)


class TextPart(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    name: str | None = None
    """Accepted and ignored."""

    def chat_message(self, index: int) -> ChatMessage:
        """Raises InvalidInput for tool calls."""
        for field in ("tool_calls", "function_call"):
            if (self.model_extra or {}).get(field):
                raise InvalidInput(f"'{field}' is not supported.", param=f"messages.{index}.{field}")
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return ChatMessage(role=self.role, content=text)


class ChatCompletionRequest(SamplingFields):
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=_INT32)] | None = None
    """Takes precedence over ``max_tokens``."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def call(self, config: GatewayConfig) -> GenerateCall:
        """Raises InvalidInput."""
        self.refuse_unsupported()
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidInput("'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs")
        return GenerateCall(
            endpoint="chat.completions",
            model=self.model,
            prompts=(ChatPrompt(messages=tuple(m.chat_message(i) for i, m in enumerate(self.messages))),),
            options=self.options(
                max_tokens=self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens,
                num_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            ),
            max_logprobs=config.max_chat_logprobs,
            priority=self.call_priority(),
            stream=bool(self.stream),
        )


class CompletionRequest(SamplingFields):
    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, fail_fast=True)]
        | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
    )
    echo: bool | None = None
    best_of: int | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    def call(self, config: GatewayConfig) -> GenerateCall:
        """Raises InvalidInput."""
        self.refuse_unsupported()
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise InvalidInput("'best_of' other than 'n' is not supported.", param="best_of")
        return GenerateCall(
            endpoint="completions",
            model=self.model,
            prompts=self._prompts(),
            options=self.options(max_tokens=self.max_tokens, num_logprobs=self.logprobs),
            default_max_tokens=config.default_completion_tokens,
            max_logprobs=config.max_completion_logprobs,
            priority=self.call_priority(),
            stream=bool(self.stream),
            echo=bool(self.echo),
        )

    def _prompts(self) -> tuple[Prompt, ...]:
        value: Any = self.prompt
        if isinstance(value, str):
            return (TextPrompt(text=value),)
        if isinstance(value[0], int):
            return (TokenPrompt(token_ids=tuple(value)),)
        if isinstance(value[0], str):
            return tuple(TextPrompt(text=text) for text in value)
        return tuple(TokenPrompt(token_ids=tuple(ids)) for ids in value)
