"""How long bytes take to reach a GPU from each tier: artifact store -> node disk -> host memory -> GPU. Pure.

Called through ``CostProfile.load_time``.
"""

from enum import StrEnum
from typing import Annotated, Self

import msgspec

_NotNegative = Annotated[float, msgspec.Meta(ge=0)]
_Positive = Annotated[float, msgspec.Meta(gt=0)]


class Tier(StrEnum):
    """Where bytes lie, farthest first."""

    STORE = "store"
    DISK = "disk"
    HOST = "host"
    """Pinned memory, in GPU layout."""


class Hop(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """From one tier to the next."""

    latency_s: _NotNegative
    bytes_per_s: _Positive

    def slowed(self, factor: float) -> Self:
        """``factor`` times the time."""
        return type(self)(latency_s=factor * self.latency_s, bytes_per_s=self.bytes_per_s / factor)

    def seconds(self, num_bytes: float) -> float:
        return self.latency_s + num_bytes / self.bytes_per_s


class LoadRates(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of one node's GPU with nothing else on the way."""

    store: Hop
    """Artifact store to the node's disk."""
    disk: Hop
    """Disk to host memory, checked and packed into GPU layout."""
    host: Hop
    """Host memory to the GPU; each GPU has a link of its own."""

    def slowed(self, factor: float) -> Self:
        """``factor`` times the time."""
        return type(self)(store=self.store.slowed(factor), disk=self.disk.slowed(factor), host=self.host.slowed(factor))

    def seconds(self, num_bytes: float, source: Tier = Tier.HOST, *, num_gpus: int = 1) -> float:
        """From ``source`` to the GPU, hop after hop. ``num_gpus``: over which the bytes are divided."""
        seconds = self.host.seconds(num_bytes / num_gpus)
        if source is not Tier.HOST:
            seconds += self.disk.seconds(num_bytes)
        if source is Tier.STORE:
            seconds += self.store.seconds(num_bytes)
        return seconds
