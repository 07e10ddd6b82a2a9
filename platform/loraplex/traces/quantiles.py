"""Quantiles in one pass and bounded memory: exact for few values, then within half a percent by logarithmic bins.

Source of the bins: DDSketch (Masson, Rim, Lee, VLDB'19) with a fixed range. Called by the statistics and the plots.
"""

import math

import numpy as np
import numpy.typing as npt

EXACT_VALUES = 1 << 16
"""So many values are kept as they are; more become bins."""
_GROWTH = 1.01
"""Width of a bin: its middle is within 0.5 % of every value in it."""
_SMALLEST, _LARGEST = 1e-9, 1e12
_FIRST = math.floor(math.log(_SMALLEST, _GROWTH))
NUM_BINS = math.ceil(math.log(_LARGEST, _GROWTH)) - _FIRST + 2
"""The first one is for what is under 1e-9."""
_Floats = npt.NDArray[np.float64]
_Longs = npt.NDArray[np.int64]


def bin_of(values: _Floats) -> _Longs:
    """[N] int64, in order of the values; not negative."""
    clipped = np.clip(values, _SMALLEST, _LARGEST)
    bins = np.floor(np.log(clipped) / math.log(_GROWTH)).astype(np.int64) - _FIRST + 1
    bins[values < _SMALLEST] = 0
    return bins


def value_of(bins: _Longs) -> _Floats:
    """Middle of each bin. [N] float64."""
    values: _Floats = np.where(bins == 0, 0.0, _GROWTH ** (bins + (_FIRST - 0.5)))
    return values


class QuantileSketch:
    """Of values that are not negative."""

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self.max = -math.inf
        self._min = math.inf
        self._exact: list[_Floats] = []
        self._bins: _Longs | None = None

    def add(self, values: _Floats) -> None:
        """[N] float64, no nan."""
        if not len(values):
            return
        self.count += len(values)
        self.total += float(values.sum())
        self.max = max(self.max, float(values.max()))
        self._min = min(self._min, float(values.min()))
        if self._bins is None:
            self._exact.append(values)
            if self.count > EXACT_VALUES:
                self._bins = np.bincount(bin_of(np.concatenate(self._exact)), minlength=NUM_BINS)
                self._exact = []
        else:
            self._bins += np.bincount(bin_of(values), minlength=NUM_BINS)

    def quantile(self, share: float) -> float:
        """``share`` from 0 to 1, ``count`` at least 1."""
        if self._bins is None:
            return float(np.quantile(np.concatenate(self._exact), share))
        place = int(np.searchsorted(np.cumsum(self._bins), share * (self.count - 1), side="right"))
        return float(np.clip(value_of(np.array([place]))[0], self._min, self.max))


class GroupedSketch:
    """One histogram for each of many groups, together as sparse as their values: memory follows the bins in use."""

    def __init__(self) -> None:
        self._keys: _Longs = np.empty(0, dtype=np.int64)
        self._counts: _Longs = np.empty(0, dtype=np.int64)
        self._pending: list[tuple[_Longs, _Longs]] = []
        self._num_pending = 0

    def add(self, group: npt.NDArray[np.int32], values: _Floats) -> None:
        """[N] int32 and [N] float64, no nan."""
        keys, counts = np.unique(group.astype(np.int64) * NUM_BINS + bin_of(values), return_counts=True)
        self._pending.append((keys, counts))
        self._num_pending += len(keys)
        if self._num_pending > max(len(self._keys), EXACT_VALUES):
            self._merge()

    def quantiles(self, share: float, num_groups: int) -> _Floats:
        """Of every group; nan for one without values. [num_groups] float64."""
        self._merge()
        result = np.full(num_groups, np.nan)
        starts = np.searchsorted(self._keys, np.arange(num_groups + 1) * NUM_BINS)
        for group in np.flatnonzero(np.diff(starts)):
            part = slice(starts[group], starts[group + 1])
            passed = np.cumsum(self._counts[part])
            place = np.searchsorted(passed, share * (passed[-1] - 1), side="right")
            result[group] = value_of(self._keys[part][place : place + 1] - group * NUM_BINS)[0]
        return result

    def _merge(self) -> None:
        keys = np.concatenate([self._keys, *(each[0] for each in self._pending)])
        counts = np.concatenate([self._counts, *(each[1] for each in self._pending)])
        self._keys, inverse = np.unique(keys, return_inverse=True)
        self._counts = np.bincount(inverse, weights=counts, minlength=len(self._keys)).astype(np.int64)
        self._pending, self._num_pending = [], 0
