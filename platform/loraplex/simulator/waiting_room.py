"""Requests of one base that wait in the simulated router, in the order of ``router.queue``. Called by ``exact``.

The tenant with the fewest requests on replicas goes first, then who came first.
"""

from collections import Counter


class WaitingRoom:
    def __init__(self) -> None:
        self._tenant_of: dict[int, int] = {}
        self._placed: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._tenant_of)

    def push(self, row: int, tenant: int) -> None:
        self._tenant_of[row] = tenant

    def remove(self, row: int) -> bool:
        """False when it does not wait here."""
        return self._tenant_of.pop(row, None) is not None

    def placed(self, tenant: int, count: int) -> None:
        """``count`` requests of the tenant went to a replica (or, negative, left it)."""
        self._placed[tenant] += count

    def in_order(self) -> list[int]:
        return sorted(self._tenant_of, key=lambda row: (self._placed[self._tenant_of[row]], row))
