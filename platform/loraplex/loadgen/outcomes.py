"""What came of each request, measured or predicted, in one form: who, when, TTFT, TPOT; and which met their targets.

Pure. Called by ``report``, ``prediction`` and ``page``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt

from loraplex.loadgen.completion import Sample
from loraplex.simulator.types import FloatArray, IntArray, Slo

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcomes:
    """R requests. All arrays are of shape (R,)."""

    at_s: FloatArray
    """When each was due, from the start of the run."""
    tenants: tuple[str, ...]
    tenant: IntArray
    """Index into ``tenants``."""
    ttft_s: FloatArray
    """Infinite for requests without a complete answer."""
    tpot_s: FloatArray
    """Likewise; 0 for answers of one token, which have none."""

    @classmethod
    def of_samples(cls, samples: Sequence[Sample]) -> Self:
        """TTFT counts from the scheduled time. In the order of ``samples``."""
        tenants = tuple(sorted({sample.target.tenant for sample in samples}))
        index = {tenant: number for number, tenant in enumerate(tenants)}
        ttft_s, tpot_s = np.full(len(samples), np.inf), np.full(len(samples), np.inf)
        for row, sample in enumerate(samples):
            if sample.error is None and sample.first_token_s is not None:
                ttft_s[row] = sample.first_token_s - sample.scheduled_s
                tpot_s[row] = (sample.end_s - sample.first_token_s) / max(sample.output_tokens - 1, 1)
                if sample.output_tokens < 2:
                    tpot_s[row] = 0.0
        return cls(
            at_s=np.array([sample.scheduled_s for sample in samples], dtype=np.float64),
            tenants=tenants,
            tenant=np.array([index[sample.target.tenant] for sample in samples], dtype=np.int32),
            ttft_s=ttft_s,
            tpot_s=tpot_s,
        )

    def __len__(self) -> int:
        return len(self.at_s)

    def since(self, at_s: float) -> Self:
        """Only the requests that were due at ``at_s`` or later."""
        return self.of_rows(self.at_s >= at_s)

    def of_rows(self, rows: Mask) -> Self:
        """Only these."""
        return replace(
            self, at_s=self.at_s[rows], tenant=self.tenant[rows], ttft_s=self.ttft_s[rows], tpot_s=self.tpot_s[rows]
        )

    @property
    def served(self) -> Mask:
        return np.isfinite(self.ttft_s)

    def good(self, slo: Slo, scale: float = 1.0) -> Mask:
        """Those that met all targets, each times ``scale``."""
        met: Mask = self.served & (self.ttft_s <= scale * slo.ttft_s) & (self.tpot_s <= scale * slo.tpot_s)
        return met


@dataclass(frozen=True, slots=True, kw_only=True)
class Attainment:
    """Shares of all requests, those without an answer included. None: there was no request."""

    attainment: float | None
    """Met all targets."""
    ttft_attainment: float | None
    tpot_attainment: float | None
    goodput_per_s: float | None
    """Requests that met all targets, per second of the time in which requests were due; None: one moment."""


def attainment(outcomes: Outcomes, slo: Slo, rows: Mask | None = None) -> Attainment:
    """Of ``rows``, all by default."""
    chosen = np.ones(len(outcomes), dtype=np.bool_) if rows is None else rows
    count = int(np.count_nonzero(chosen))
    span_s = float(np.ptp(outcomes.at_s)) if len(outcomes) else 0.0
    good = int(np.count_nonzero(outcomes.good(slo)[chosen]))

    def share(met: Mask) -> float | None:
        return int(np.count_nonzero((outcomes.served & met)[chosen])) / count if count else None

    return Attainment(
        attainment=good / count if count else None,
        ttft_attainment=share(outcomes.ttft_s <= slo.ttft_s),
        tpot_attainment=share(outcomes.tpot_s <= slo.tpot_s),
        goodput_per_s=good / span_s if span_s > 0 else None,
    )


def percentile(values: FloatArray, percent: float) -> float:
    """The next greater value, so that infinite ones count for what they are: no number lies between them and others."""
    return float(np.percentile(values, percent, method="higher"))
