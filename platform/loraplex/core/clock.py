"""Time as a value. Pure parts take ``now_s``; edges read a Clock, so that tests and the simulator can hold it."""

import time
from typing import Protocol


class Clock(Protocol):
    def monotonic_s(self) -> float:
        """Seconds that never go back; origin unspecified."""

    def wall_s(self) -> float:
        """Seconds since the Unix epoch, UTC."""


class SystemClock:
    def monotonic_s(self) -> float:
        return time.monotonic()

    def wall_s(self) -> float:
        return time.time()
