"""Where values lie on a picture, and at which of them an axis says a number."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """``low`` is drawn at ``start``, ``high`` at ``end``, in units of the picture."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False
    """Needs ``low`` above 0."""

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int = 6) -> list[float]:
        """Round numbers from ``low`` to ``high``, about ``count`` of them: on a logarithmic scale powers of 2 or 10."""
        if not self.high > self.low:
            return [self.low]
        if self.is_log and self.high / self.low >= 4:
            base = 2.0 if self.high / self.low <= 128 else 10.0
            first = math.ceil(math.log(self.low, base) - 1e-9)
            last = math.floor(math.log(self.high, base) + 1e-9)
            every = math.ceil((last - first + 1) / (2 * count))
            return [base**power for power in range(first, last + 1, every)]
        # A third of the span at most, so that even the coarsest rounding of the step leaves a tick within it.
        step = round_up((self.high - self.low) / max(count, 3))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def round_up(value: float) -> float:
    """The next of 1, 2, 5 times a power of ten; 1 for 0."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value * (1 - 1e-9))


def round_top(low: float, high: float, count: int = 5) -> float:
    """The first value not below ``high`` that is a whole number of round steps above ``low``."""
    step = round_up((high - low) / count)
    return low + max(math.ceil((high - low) / step - 1e-9), 1) * step


def short(value: float) -> str:
    """As axes say it."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def spanned(values: Sequence[float]) -> tuple[float, float]:
    """Least and greatest of those that are finite; (0, 1) when none is."""
    finite = [value for value in values if math.isfinite(value)]
    return (min(finite), max(finite)) if finite else (0.0, 1.0)
