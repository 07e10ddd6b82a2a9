"""Keeps the number of values of a metric label bounded, whatever tenants do. Used by the metric owners."""

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

OTHER = "other"

Value = TypeVar("Value", bound=Hashable)

_MAX_TRACKED = 20_000
_STAYS_BY = 1.25
"""A newcomer must have this many times the requests of who it replaces: equals do not take turns."""


class LabelCap:
    """The first ``max_values`` distinct values keep their own label; later ones share ``other``."""

    def __init__(self, max_values: int) -> None:
        self._max_values = max_values
        self._seen: set[str] = set()

    def __call__(self, value: str) -> str:
        if value in self._seen:
            return value
        if len(self._seen) < self._max_values:
            self._seen.add(value)
            return value
        return OTHER


class TopValues(Generic[Value]):
    """The ``max_values`` values that are counted most: chosen anew each ``window_s`` by their counts, where a window
    counts half as much as the next. While there is room every value is among them.

    Between two choices nothing changes, so that the counters of a label only grow; of one that leaves they end.
    """

    def __init__(self, max_values: int, *, window_s: float, on_leave: Callable[[Value], None]) -> None:
        """``on_leave``: called also with one that was chosen and not counted since, so that nobody knows its label."""
        self._max_values = max_values
        self._window_s = window_s
        self._on_leave = on_leave
        self._chosen: set[Value] = set()
        self._scores: dict[Value, float] = {}
        self._next_choice_s: float | None = None

    def count(self, value: Value, now_s: float) -> bool:
        """True: it is among them and has a label of its own. ``now_s`` never goes back."""
        if self._next_choice_s is None:
            self._next_choice_s = now_s + self._window_s
        elif now_s >= self._next_choice_s:
            self._choose()
            self._next_choice_s = now_s + self._window_s
        score = self._scores.get(value)
        if score is not None or len(self._scores) < _MAX_TRACKED:
            self._scores[value] = (score or 0.0) + 1.0
        if value not in self._chosen and len(self._chosen) < self._max_values:
            self._chosen.add(value)
        return value in self._chosen

    def validate(self) -> None:
        """Raises AssertionError on a broken invariant."""
        assert len(self._chosen) <= self._max_values, "more values than labels"
        assert len(self._scores) <= _MAX_TRACKED, "more values are tracked than may be"

    def _choose(self) -> None:
        def weight(value: Value) -> float:
            return self._scores.get(value, 0.0) * (_STAYS_BY if value in self._chosen else 1.0)

        ranked = sorted(self._scores.keys() | self._chosen, key=weight, reverse=True)
        best = {value for value in ranked[: self._max_values] if value in self._scores}
        for value in self._chosen - best:
            self._on_leave(value)
        self._chosen = best
        self._scores = {value: score / 2 for value, score in self._scores.items() if score >= 1.0}
