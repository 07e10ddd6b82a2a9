"""What would have been fair, to measure by: max-min division among weighted tenants, Jain's index. Pure.

Called by studies and benchmarks.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


def max_min_shares(asked: Sequence[float], total: float, weights: Sequence[float] | None = None) -> FloatArray:
    """``total`` divided: nobody gets more than asked for, and what somebody leaves goes to the others by weight."""
    wanted = np.asarray(asked, dtype=np.float64)
    weight = np.ones_like(wanted) if weights is None else np.asarray(weights, dtype=np.float64)
    given = np.zeros_like(wanted)
    left, open_ = total, np.ones(len(wanted), dtype=bool)
    while open_.any():
        level = left / weight[open_].sum()
        modest = open_ & (wanted <= level * weight)
        if not modest.any():
            given[open_] = level * weight[open_]
            break
        given[modest] = wanted[modest]
        left -= wanted[modest].sum()
        open_ &= ~modest
    return given


def jain_index(values: Sequence[float]) -> float:
    """1 when all are equal, 1 / n when one has everything (Jain, Chiu and Hawe, 1984)."""
    found = np.asarray(values, dtype=np.float64)
    squares = float(len(found) * (found**2).sum())
    return float(found.sum() ** 2) / squares if squares else 1.0
