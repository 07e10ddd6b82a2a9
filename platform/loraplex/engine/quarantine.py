"""Which requests the next steps run alone, because a step of theirs failed. Called by ``scheduler``."""

from collections import deque
from collections.abc import Iterable

from loraplex.engine.sequence import Sequence


class Quarantine:
    def __init__(self) -> None:
        self._sets: deque[frozenset[Sequence]] = deque()

    def __bool__(self) -> bool:
        return bool(self._sets)

    def isolate(self, sequences: list[Sequence]) -> None:
        """A step of these failed: run smaller sets alone until the culprit is found. Changes state.

        First apart by adapter, then by halves: one poisoned request or adapter costs a logarithm of steps, and
        nobody else fails with it.
        """
        by_adapter: dict[str, list[Sequence]] = {}
        for sequence in sequences:
            by_adapter.setdefault(sequence.adapter or "", []).append(sequence)
        if len(by_adapter) > 1:
            parts = list(by_adapter.values())
        else:
            middle = len(sequences) // 2
            parts = [sequences[:middle], sequences[middle:]]
        self._sets.extendleft(frozenset(part) for part in reversed(parts))

    def put_first(self, sequences: Iterable[Sequence]) -> None:
        """These have the next step for themselves. Changes state."""
        self._sets.appendleft(frozenset(sequences))

    def next_set(self) -> frozenset[Sequence] | None:
        """Those of the first set that still run; None when everybody may run. Changes state."""
        while self._sets:
            alive = frozenset(sequence for sequence in self._sets[0] if sequence.slot is not None)
            if alive:
                return alive
            self._sets.popleft()
        return None

    def step_done(self) -> None:
        """The first set has had its turn. Changes state."""
        if self._sets:
            self._sets.popleft()
