"""Counts and gaps per group (a tenant, an adapter, or the whole trace), added up over chunks in order of arrival."""

import numpy as np
import numpy.typing as npt

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int32]


class GroupTally:
    """Sums per group, in arrays that grow with the number of groups."""

    def __init__(self, sums: tuple[str, ...] = ()) -> None:
        """``sums``: names of further columns to add up."""
        self._sums = {name: np.zeros(0) for name in ("requests", "gaps", "gap_total", "gap_squares", *sums)}
        self._last_s = np.zeros(0)

    def add(self, group: _Ints, arrival_s: _Floats, **columns: _Floats) -> None:
        """[N] each; ``arrival_s`` not falling, also from call to call; nan in ``columns`` counts as nothing."""
        self._grow(int(group.max(initial=-1)) + 1)
        order = np.argsort(group, kind="stable")
        group, arrival_s = group[order], arrival_s[order]
        first = np.flatnonzero(np.diff(group, prepend=-1))
        before_s = np.concatenate([[np.nan], arrival_s[:-1]])
        before_s[first] = self._last_s[group[first]]
        gaps_s = arrival_s - before_s
        known = ~np.isnan(gaps_s)
        self._last_s[group] = arrival_s  # the last of a group stays
        self._sum("requests", group, np.ones(len(group)))
        self._sum("gaps", group, known.astype(np.float64))
        self._sum("gap_total", group, np.where(known, gaps_s, 0.0))
        self._sum("gap_squares", group, np.where(known, gaps_s, 0.0) ** 2)
        for name, values in columns.items():
            self._sum(name, group, np.nan_to_num(values[order]))

    def total(self, name: str) -> _Floats:
        """Per group. [G] float64."""
        return self._sums[name]

    def gap_cv(self) -> _Floats:
        """Standard deviation / mean of the gaps; nan with fewer than two gaps or none of any length. [G] float64."""
        gaps, total = self._sums["gaps"], self._sums["gap_total"]
        usable = (gaps >= 2) & (total > 0)
        mean = np.divide(total, gaps, out=np.ones_like(total), where=usable)
        squares = np.divide(self._sums["gap_squares"], gaps, out=np.ones_like(total), where=usable)
        cv: _Floats = np.where(usable, np.sqrt(np.maximum(squares - mean**2, 0.0)) / mean, np.nan)
        return cv

    def _sum(self, name: str, group: _Ints, values: _Floats) -> None:
        self._sums[name] += np.bincount(group, weights=values, minlength=len(self._last_s))

    def _grow(self, num_groups: int) -> None:
        more = num_groups - len(self._last_s)
        if more > 0:
            self._last_s = np.concatenate([self._last_s, np.full(more, np.nan)])
            for name, values in self._sums.items():
                self._sums[name] = np.concatenate([values, np.zeros(more)])


def zipf_exponent(counts: _Floats) -> float | None:
    """Most likely s of a law rank ** -s for these counts; None with fewer than two groups or rows.

    The most likely s is the one whose mean log rank is the one seen; found by halving between 0 and 20.
    """
    falling = np.sort(counts)[::-1]
    if len(falling) < 2 or falling.sum() < 2:
        return None
    log_rank = np.log(np.arange(1, len(falling) + 1))
    seen = float(falling @ log_rank / falling.sum())
    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        weights = np.exp(-middle * log_rank)
        if float(weights @ log_rank / weights.sum()) > seen:
            low = middle
        else:
            high = middle
    return (low + high) / 2
