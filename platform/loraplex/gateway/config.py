"""The gateway's own settings. Composed into the platform's YAML by ``loraplex.config``; read by nobody else."""

import msgspec


class GatewayConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits and periods of one gateway process."""

    max_body_bytes: int = 8 * 1024 * 1024
    """JSON bodies above this are refused with 413."""
    max_upload_bytes: int = 2 * 1024 * 1024 * 1024
    """Adapter uploads above this are refused with 413; the registry has its own, tighter, limits."""
    upload_chunk_bytes: int = 1024 * 1024
    """Size of the pieces in which an upload is handed to the controller."""
    max_n: int = 16
    """Choices per prompt."""
    max_prompts: int = 64
    """Prompts in one completions request."""
    max_choices: int = 128
    """Prompts times choices in one request."""
    max_stop_strings: int = 16
    """Stop strings in one request."""
    max_stop_chars: int = 256
    """Characters of one stop string."""
    max_chat_logprobs: int = 20
    """``top_logprobs`` of chat completions and of gRPC."""
    max_completion_logprobs: int = 5
    """``logprobs`` of completions."""
    default_completion_tokens: int = 16
    """``max_tokens`` of a completions request that names none, as in the OpenAI API. Chat takes what the
    context has left."""
    default_output_reservation: int = 512
    """Output tokens reserved against the quota when a request names no ``max_tokens``; the rest is settled at the
    end."""
    first_token_deadline_s: float = 30.0
    """An online request that cannot get its first token within this is refused by the router."""
    inline_tokenize_chars: int = 4096
    """Longer prompts are tokenized in a thread, so that they do not hold up other streams."""
    snapshot_poll_s: float = 20.0
    """Longest wait of one long poll for a newer snapshot."""
    retry_min_s: float = 0.1
    """First pause after a failed call to the controller; doubles up to ``retry_max_s``."""
    retry_max_s: float = 2.0
    """Longest pause between calls to a controller that is away."""
    visibility_wait_s: float = 2.0
    """After a change, how long the gateway waits to see it in its own snapshot before it answers."""
