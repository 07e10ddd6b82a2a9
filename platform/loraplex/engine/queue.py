"""Holds the requests that wait, grouped by (class, tenant, adapter), in order of arrival within a group.

Knows no pages and no budgets; the order between groups is the scheduler's. Called by ``scheduler``.
"""

from bisect import bisect_left, insort
from collections.abc import Collection, Iterator

from loraplex.core.ids import Digest, TenantName
from loraplex.engine.sequence import Sequence

GroupKey = tuple[TenantName, Digest | None]


def _rank(sequence: Sequence) -> tuple[bool, float, int]:
    return sequence.rank


class WaitingQueue:
    def __init__(self) -> None:
        self._groups: tuple[dict[GroupKey, list[Sequence]], ...] = ({}, {})
        self._of_adapter: dict[Digest, set[Sequence]] = {}
        self._size = 0
        self.num_tokens = 0
        """Known tokens of all that wait; each will be prefilled unless the prefix cache has it."""

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for groups in self._groups for group in groups.values() for sequence in group)

    def push(self, sequence: Sequence) -> None:
        """Changes state."""
        key = (sequence.tenant, sequence.adapter)
        insort(self._groups[sequence.offline].setdefault(key, []), sequence, key=_rank)
        if sequence.adapter is not None:
            self._of_adapter.setdefault(sequence.adapter, set()).add(sequence)
        self._size += 1
        self.num_tokens += len(sequence.token_ids)

    def remove(self, sequence: Sequence) -> None:
        """Changes state."""
        groups, key = self._groups[sequence.offline], (sequence.tenant, sequence.adapter)
        group = groups[key]
        index = bisect_left(group, sequence.rank, key=_rank)
        assert group[index] is sequence, "a request is not where its rank says"
        del group[index]
        if not group:
            del groups[key]
        if sequence.adapter is not None:
            of_adapter = self._of_adapter[sequence.adapter]
            of_adapter.remove(sequence)
            if not of_adapter:
                del self._of_adapter[sequence.adapter]
        self._size -= 1
        self.num_tokens -= len(sequence.token_ids)

    def heads(self, *, offline: bool, without: Collection[Sequence]) -> list[Sequence]:
        """The first of each group of one class, those in ``without`` left aside."""
        firsts = (
            next((sequence for sequence in group if sequence not in without), None)
            for group in self._groups[offline].values()
        )
        return [first for first in firsts if first is not None]

    def of_adapter(self, digest: Digest) -> list[Sequence]:
        return sorted(self._of_adapter.get(digest, ()), key=_rank)

    def validate(self) -> None:
        waiting = list(self)
        assert len(waiting) == self._size, "size differs"
        assert sum(len(s.token_ids) for s in waiting) == self.num_tokens, "tokens differ"
        assert {s for group in self._of_adapter.values() for s in group} == {
            s for s in waiting if s.adapter is not None
        }
        for groups in self._groups:
            for group in groups.values():
                assert group, "an empty group stayed"
                assert group == sorted(group, key=_rank), "a group is out of order"
