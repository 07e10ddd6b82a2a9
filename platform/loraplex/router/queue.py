"""What waits in the router for a credit, per base: who is next, and how long the queue is.

Resumed first, then online before offline, then the tenant with the fewest generations on replicas, then order of
arrival. Called by ``router``; knows no replicas.
"""

from collections import Counter

from loraplex.core.ids import BaseModelId, TenantName
from loraplex.core.request import Priority
from loraplex.router.stream import RoutedStream


class RouterQueue:
    def __init__(self) -> None:
        self._streams: dict[BaseModelId, dict[int, RoutedStream]] = {}
        self._placed: Counter[TenantName] = Counter()

    def num_generations(self, base_model_id: BaseModelId) -> int:
        return sum(len(stream.pending) for stream in self._streams.get(base_model_id, {}).values())

    def bases(self) -> tuple[BaseModelId, ...]:
        return tuple(self._streams)

    def push(self, stream: RoutedStream) -> None:
        self._streams.setdefault(stream.first.base_model_id, {})[stream.order] = stream

    def remove(self, stream: RoutedStream) -> None:
        """Ignored when it does not wait here."""
        base_model_id = stream.first.base_model_id
        waiting = self._streams.get(base_model_id)
        if waiting is not None and waiting.pop(stream.order, None) is not None and not waiting:
            del self._streams[base_model_id]

    def next(self, base_model_id: BaseModelId) -> RoutedStream | None:
        """Who goes next; stays in the queue until removed."""
        waiting = self._streams.get(base_model_id)
        return min(waiting.values(), key=self._rank) if waiting else None

    def placed(self, tenant: TenantName, count: int) -> None:
        """``count`` generations of the tenant went to a replica (or, negative, left it)."""
        self._placed[tenant] += count
        if self._placed[tenant] <= 0:
            del self._placed[tenant]

    def waiting(self, base_model_id: BaseModelId) -> list[RoutedStream]:
        return list(self._streams.get(base_model_id, {}).values())

    def all(self) -> list[RoutedStream]:
        return [stream for waiting in self._streams.values() for stream in waiting.values()]

    def _rank(self, stream: RoutedStream) -> tuple[bool, bool, int, int]:
        first = stream.first
        return not stream.resumed, first.priority is Priority.OFFLINE, self._placed[first.tenant], stream.order
