"""The engine's own settings. Composed into the platform's YAML; sizes of the arena come from the executor."""

from typing import Annotated

import msgspec

_Positive = Annotated[int, msgspec.Meta(ge=1)]
_NotNegative = Annotated[float, msgspec.Meta(ge=0)]


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much one engine runs at once, and how it orders what waits."""

    max_step_tokens: _Positive = 2048
    """Tokens of one forward pass, decode rows and prefill chunks together; of a pipeline all its steps in flight. Not
    less than ``max_running``."""
    max_running: _Positive = 256
    """Requests that hold a slot at the same time."""
    max_waiting: _Positive = 64
    """Requests that the engine is ready to hold beyond ``max_running``; what is more waits in the routers."""
    prefix_cache: bool = True
    """Keep the KV of finished requests and share it with later ones of the same tenant, base and adapter."""
    overdue_s: _NotNegative = 2.0
    """A request whose adapter is ready and that has waited this long pays no price for its adapter, and once it is its
    tenant's turn nothing passes it. Bounds the wait of cold adapters and of large requests; the order among tenants
    stays that of their counters, however long the queue is."""
    prefill_token_cost: _NotNegative = 1.0
    """What one prompt token adds to its tenant's counter (cached prefix tokens add nothing)."""
    decode_token_cost: _NotNegative = 2.0
    """What one generated token adds to its tenant's counter."""
    adapter_token_price: _NotNegative = 0.25
    """Added to the counter of a request, per token whose KV would fit where its adapter is, while that adapter is in no
    running request: its bytes would be read in every step. In units of the counters."""
    max_adapter_bytes: _Positive | None = None
    """Of the arena (of each rank), that resident adapters may hold together, the rest being left to KV; None: all."""
    max_host_bytes: _Positive = 32 << 30
    """Staged adapters kept in host memory; beyond it idle ones go, least recently used first. Each rank of a group may
    hold so much, which only adds up where adapters are many: a rank has its part of an adapter."""
    max_ahead_bytes: Annotated[int, msgspec.Meta(ge=0)] = 1 << 30
    """Adapters of waiting requests are loaded before their turn, into pages that nobody nearer needs: so much of them
    may be resident and not yet used (one adapter may be larger); 0: nothing. What is on its way is in the way of who
    comes next: 1 GiB is 24 ms of copying at 45 GB/s."""
