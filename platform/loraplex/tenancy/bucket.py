"""A token bucket over one limit per minute, of which this gateway holds a share. Pure. Used by ``quota_gate``.

Capacity C = limit x share (one minute's worth), refill C / 60 per second. In any T seconds it admits at most
C x (1 + T / 60) plus one request that is larger than C. A share that grows refills faster but is given no tokens at
once; one that shrinks clips the level. So moving shares to and fro among gateways creates no tokens.
"""

import math

SECONDS_PER_MINUTE = 60.0


class TokenBucket:
    __slots__ = ("_capacity", "_level", "_touched", "_updated_s")

    def __init__(self, limit: int, share: float, now_s: float) -> None:
        """Starts full."""
        self._capacity = limit * share
        self._level = self._capacity
        self._updated_s = now_s
        self._touched = self._capacity > 0

    def resize(self, limit: int, share: float, now_s: float) -> None:
        """New limit or share from ``now_s`` on. A bucket that never held a share yet starts full."""
        self.advance(now_s)
        self._capacity = limit * share
        self._level = min(self._level, self._capacity) if self._touched else self._capacity
        self._touched = self._touched or self._capacity > 0

    def wait_s(self, amount: int, now_s: float) -> float:
        """Seconds until ``amount`` may be taken: 0 now, infinity with an empty share.

        An amount above the capacity needs a full bucket and leaves a debt, so that a small share delays a large
        request and never shuts it out.
        """
        self.advance(now_s)
        if amount <= 0:
            return 0.0
        if self._capacity <= 0:
            return math.inf
        missing = min(amount, self._capacity) - self._level
        # Refilling sums many small numbers: a bucket short by rounding alone counts as full.
        if missing <= 1e-9 * self._capacity:
            return 0.0
        return missing * SECONDS_PER_MINUTE / self._capacity

    def take(self, amount: int) -> None:
        """After ``wait_s`` said 0 at the same time; also charges what a request used beyond its reservation."""
        self._level -= amount

    def give_back(self, amount: int) -> None:
        self._level = min(self._capacity, self._level + amount)

    def validate(self) -> None:
        assert self._capacity >= 0
        assert self._level <= self._capacity

    def advance(self, now_s: float) -> None:
        """Refills up to ``now_s``; a time before the last one changes nothing."""
        elapsed_s = max(0.0, now_s - self._updated_s)
        self._updated_s = max(now_s, self._updated_s)
        self._level = min(self._capacity, self._level + elapsed_s * self._capacity / SECONDS_PER_MINUTE)
