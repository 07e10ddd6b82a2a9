"""How often something failed in a row, and when it may be tried again. Pure: the caller brings the time."""

from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(slots=True)
class _Failed:
    count: int
    not_before_s: float
    reason: str


class Attempts:
    """The wait doubles from ``first_s`` to ``max_s``. What fails again while it waits was begun before: it counts as
    the same attempt."""

    def __init__(self, *, first_s: float, max_s: float) -> None:
        self._first_s, self._max_s = first_s, max_s
        self._failed: dict[Hashable, _Failed] = {}

    def failed(self, key: Hashable, reason: str, now_s: float) -> None:
        last = self._failed.get(key)
        if last is not None and now_s < last.not_before_s:
            last.reason = reason
            return
        count = 1 if last is None else last.count + 1
        wait_s = min(self._max_s, self._first_s * 2.0 ** min(count - 1, 30))
        self._failed[key] = _Failed(count, now_s + wait_s, reason)

    def succeeded(self, key: Hashable) -> None:
        self._failed.pop(key, None)

    def clear(self) -> None:
        self._failed.clear()

    def held_back(self, key: Hashable, now_s: float) -> bool:
        failed = self._failed.get(key)
        return failed is not None and now_s < failed.not_before_s

    def count(self, key: Hashable) -> int:
        failed = self._failed.get(key)
        return 0 if failed is None else failed.count

    def reason(self, key: Hashable) -> str:
        failed = self._failed.get(key)
        return "" if failed is None else failed.reason
