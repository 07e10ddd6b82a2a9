"""What a load run sends and how long it waits. Built by the CLI from its options."""

from enum import StrEnum

import msgspec

from loraplex.core.errors import BadConfig


class Endpoint(StrEnum):
    COMPLETIONS = "completions"
    CHAT = "chat"

    @property
    def path(self) -> str:
        return "/v1/completions" if self is Endpoint.COMPLETIONS else "/v1/chat/completions"


class RequestConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The same for every request of a run."""

    endpoint: Endpoint = Endpoint.COMPLETIONS
    """Completions by default: no chat template adds tokens to the prompt."""
    ignore_eos: bool = True
    """Sends ``ignore_eos``, so that every answer has the length that the schedule asks for. Off for servers that do
    not know the field."""
    timeout_s: float = 600.0
    """From sending to the last byte; longer counts as the error ``timeout``."""
    connect_timeout_s: float = 10.0
    seed: int = 0
    """Prompts are a pure function of the seed and the request's index."""

    def __post_init__(self) -> None:
        for name in ("timeout_s", "connect_timeout_s"):
            if not getattr(self, name) > 0:
                raise BadConfig(f"{name} is {getattr(self, name)}, must be greater than 0", param=name)


class ReplayConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a trace becomes a schedule."""

    speed: float = 1.0
    """2 sends twice as fast as recorded."""
    duration_s: float | None = None
    """Seconds of sending; None: the whole trace."""
    max_requests: int | None = None
    default_prompt_tokens: int = 128
    """For rows that do not say."""
    default_output_tokens: int = 64
    max_prompt_tokens: int | None = None
    """Longer prompts are cut to this, so that they fit the model's context."""
    max_output_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in (
            "speed",
            "duration_s",
            "max_requests",
            "default_prompt_tokens",
            "default_output_tokens",
            "max_prompt_tokens",
            "max_output_tokens",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise BadConfig(f"{name} is {value}, must be greater than 0", param=name)
