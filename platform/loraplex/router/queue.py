"""What waits in the router for one base, and who is next. Mutable; called by ``router`` and by the exact simulator.

First what was on a replica before; online before offline; then the tenant that has had least of the base; of its
requests the one that is due first. A replica that takes a request is chosen when its turn has come, not before.
"""

from bisect import insort
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from loraplex.core.ids import TenantName
from loraplex.tenancy.fairness import ServiceCounters

Item = TypeVar("Item", bound=Hashable)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """Where a request stands among those that wait."""

    tenant: TenantName
    order: int
    """Of arrival; distinct."""
    due_s: float = 0.0
    """When its first token should be there; the same clock for all."""
    resumed: bool = False
    offline: bool = False
    only: Hashable = None
    """Names the set of replicas that may take it; None: all of the base."""
    weight: float = 1.0
    """Of its tenant, whose last request tells."""


_Group = tuple[bool, bool, TenantName, Hashable]


class WaitingQueue(Generic[Item]):
    def __init__(self, counters: ServiceCounters) -> None:
        """``counters``: every tenant that has something here is active in them."""
        self._counters = counters
        self._tickets: dict[Item, Ticket] = {}
        self._groups: dict[_Group, list[tuple[float, int, Item]]] = {}
        """Each in the order of (due_s, order)."""
        self._num_of_tenant: dict[TenantName, int] = {}
        self._weight_of: dict[TenantName, float] = {}

    def __len__(self) -> int:
        return len(self._tickets)

    def __contains__(self, item: Item) -> bool:
        return item in self._tickets

    def push(self, item: Item, ticket: Ticket) -> None:
        """Changes state."""
        assert item not in self._tickets, "it waits already"
        self._tickets[item] = ticket
        insort(self._groups.setdefault(_group(ticket), []), (ticket.due_s, ticket.order, item), key=_rank)
        self._num_of_tenant[ticket.tenant] = self._num_of_tenant.get(ticket.tenant, 0) + 1
        self._weight_of[ticket.tenant] = ticket.weight

    def remove(self, item: Item) -> bool:
        """False when it does not wait here. Changes state."""
        ticket = self._tickets.pop(item, None)
        if ticket is None:
            return False
        key = _group(ticket)
        self._groups[key].remove((ticket.due_s, ticket.order, item))
        if not self._groups[key]:
            del self._groups[key]
        self._num_of_tenant[ticket.tenant] -= 1
        if not self._num_of_tenant[ticket.tenant]:
            del self._num_of_tenant[ticket.tenant], self._weight_of[ticket.tenant]
        return True

    def next(self, may: Callable[[Hashable], bool]) -> Item | None:
        """Who goes next, of those whose ``only`` may; stays until removed."""
        best: Item | None = None
        best_rank: tuple[bool, bool, float, float, int] | None = None
        for (fresh, offline, tenant, only), entries in self._groups.items():
            due_s, order, item = entries[0]
            rank = (fresh, offline, self._counters.value(tenant), due_s, order)
            if (best_rank is None or rank < best_rank) and may(only):
                best, best_rank = item, rank
        return best

    def num_ahead(self, tenant: TenantName, weight: float = 1.0) -> int:
        """How many go before a new request of the tenant, if all tenants take turns by their weights."""
        turns = self._num_of_tenant.get(tenant, 0) + 1
        others = sum(other for name, other in self._weight_of.items() if name != tenant) / weight
        return min(len(self._tickets), turns - 1 + int(turns * others))

    def makes_way(self, tenant: TenantName, weight: float = 1.0) -> Item | None:
        """Who is to go so that a new request of the tenant finds room in a full queue: the last of those of the tenant
        that has most here by its weight. None when no other tenant has more than this one would have. Resumed ones
        stay."""
        greatest = max(self._num_of_tenant, key=self._held, default=None)
        if greatest is None or self._held(greatest) <= (self._num_of_tenant.get(tenant, 0) + 1) / weight:
            return None
        lasts = [entries[-1] for (fresh, _, owner, _), entries in self._groups.items() if fresh and owner == greatest]
        return max(lasts, key=_rank)[2] if lasts else None

    def _held(self, tenant: TenantName) -> float:
        """Requests by weight."""
        return self._num_of_tenant[tenant] / self._weight_of[tenant]

    def items(self) -> tuple[Item, ...]:
        return tuple(self._tickets)

    def validate(self) -> None:
        """Raises AssertionError on a broken invariant."""
        assert sum(map(len, self._groups.values())) == len(self._tickets) == sum(self._num_of_tenant.values())
        assert self._weight_of.keys() == self._num_of_tenant.keys(), "weights of tenants that have nothing here"
        for key, entries in self._groups.items():
            assert entries, "an empty group stayed"
            assert entries == sorted(entries, key=_rank), "a group is out of order"
            assert all(_group(self._tickets[item]) == key for _, _, item in entries), "in the wrong group"


def _group(ticket: Ticket) -> _Group:
    return not ticket.resumed, ticket.offline, ticket.tenant, ticket.only


def _rank(entry: tuple[float, int, object]) -> tuple[float, int]:
    return entry[0], entry[1]
