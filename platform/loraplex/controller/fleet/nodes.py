"""Which nodes may be given work: those that are up and have stayed up. Pure: the caller brings the time.

A node that leaves is not used from that moment on. One that comes back must stay for a while before it is used, twice
as long after each time that it left; a calm time forgives. The nodes of the first sight are used at once.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from loraplex.core.fleet import NodeStatus


@dataclass(slots=True)
class _Seen:
    status: NodeStatus
    is_up: bool
    since_s: float
    hold_s: float


class NodeWatch:
    """``hold_s``: how long a node must stay that has left once; ``max_hold_s``: the longest."""

    def __init__(self, *, hold_s: float, max_hold_s: float) -> None:
        self._hold_s, self._max_hold_s = hold_s, max_hold_s
        self._seen: dict[str, _Seen] = {}
        self._begun = False

    def observe(self, nodes: Iterable[NodeStatus], now_s: float) -> None:
        up = {node.name: node for node in nodes}
        for name, node in up.items():
            seen = self._seen.get(name)
            if seen is None:
                # The first sight of the cluster is no joining: a restarted controller finds it as it is.
                hold_s = self._hold_s if self._begun else 0.0
                self._seen[name] = _Seen(node, is_up=True, since_s=now_s, hold_s=hold_s)
                continue
            if not seen.is_up:
                seen.is_up, seen.since_s = True, now_s
            elif now_s - seen.since_s > self._max_hold_s:
                seen.hold_s = 0.0
            seen.status = node
        for name, seen in self._seen.items():
            if seen.is_up and name not in up:
                seen.is_up, seen.since_s = False, now_s
                seen.hold_s = min(self._max_hold_s, max(self._hold_s, 2 * seen.hold_s))
        self._begun = True

    def usable(self, now_s: float) -> tuple[NodeStatus, ...]:
        """By name."""
        return tuple(
            seen.status for _, seen in sorted(self._seen.items()) if seen.is_up and now_s - seen.since_s >= seen.hold_s
        )

    def known(self) -> tuple[NodeStatus, ...]:
        """All that were ever seen, up or not: a plan may name them."""
        return tuple(seen.status for _, seen in sorted(self._seen.items()))

    @property
    def begun(self) -> bool:
        return self._begun
