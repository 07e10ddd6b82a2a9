"""The replica's own settings: staging, the stream server, and how much may pile up for a slow gateway."""

from typing import Annotated

import msgspec


class ReplicaConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0
    """Of the stream server; 0 takes a free one."""
    staging_threads: Annotated[int, msgspec.Meta(ge=1)] = 2
    """Adapters that are fetched and read into host memory at the same time."""
    load_report_interval_s: Annotated[float, msgspec.Meta(gt=0)] = 0.1
    """A gateway without requests of its own hears of the load this often while the replica works."""
    max_unsent_tokens: Annotated[int, msgspec.Meta(ge=1)] = 1_000_000
    """A gateway that has not taken this many tokens loses its stream, which aborts its requests."""
    max_frame_bytes: Annotated[int, msgspec.Meta(ge=1 << 20)] = 64 << 20
    """Longest message that a gateway may send."""
    heartbeat_s: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    """A gateway hears from a living replica this often, whatever there is to say."""
    keepalive_s: Annotated[float, msgspec.Meta(gt=0)] = 10.0
    """A gateway that answers no ping for this long is taken for dead."""
    stop_grace_s: Annotated[float, msgspec.Meta(ge=0)] = 5.0
    """How long a stopping replica lets its running requests finish."""
