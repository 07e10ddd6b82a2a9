"""Predicted beside measured, figure by figure. Pure. Called by the page, the CLI and the measurements."""

from dataclasses import dataclass

import numpy as np

from loraplex.loadgen.outcomes import Outcomes
from loraplex.simulator.types import FloatArray, Slo

_PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One figure of both sides; None where a side has no such requests."""

    name: str
    """``attainment``, or as ``ttft_p50_s``."""
    measured: float | None
    predicted: float | None

    @property
    def is_share(self) -> bool:
        """A share of 1; else seconds."""
        return not self.name.endswith("_s")

    @property
    def difference(self) -> float | None:
        """Predicted against measured: of shares the difference, of seconds the relative one."""
        if self.measured is None or self.predicted is None:
            return None
        if self.is_share:
            return self.predicted - self.measured
        return self.predicted / self.measured - 1 if self.measured else None


def compare(measured: Outcomes, predicted: Outcomes, slo: Slo | None) -> tuple[Compared, ...]:
    """Attainment first, if there are targets, then percentiles of TTFT and TPOT over the requests served."""
    found = []
    if slo is not None:
        shares = [float(np.mean(side.good(slo))) if len(side) else None for side in (measured, predicted)]
        found.append(Compared(name="attainment", measured=shares[0], predicted=shares[1]))
    for name, left, right in (
        ("ttft", measured.ttft_s, predicted.ttft_s),
        ("tpot", measured.tpot_s, predicted.tpot_s),
    ):
        for percent in _PERCENTILES:
            sides = [_percentile(values, percent) for values in (left, right)]
            found.append(Compared(name=f"{name}_p{percent}_s", measured=sides[0], predicted=sides[1]))
    return tuple(found)


def shown_difference(figure: Compared) -> str | None:
    """``+1.2 points`` or ``+3.4%``."""
    if figure.difference is None:
        return None
    return f"{100 * figure.difference:+.1f} points" if figure.is_share else f"{figure.difference:+.1%}"


def _percentile(values: FloatArray, percent: int) -> float | None:
    served = values[np.isfinite(values)]
    return float(np.percentile(served, percent)) if len(served) else None
