"""Which adapter gets which rate, tenant and base model. Pure."""

import heapq
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from loraplex.traces.synth.recipe import Popularity


def adapter_rates(total: float, count: int, popularity: Popularity, skew: float) -> npt.NDArray[np.float64]:
    """[count] float64, requests a second, falling, with sum ``total``. Source: AlpaServe (OSDI'23), section 6.

    Summed one by one, as AlpaServe does: the last bits matter where its traces are to be repeated exactly.
    """
    if popularity is Popularity.UNIFORM:
        weights = [1.0] * count
    elif popularity is Popularity.POWER_LAW:
        weights = [(index + 1) ** -skew for index in range(count)]
    else:
        weights = [float(count - index) for index in range(count)]
    unit = total / sum(weights)
    return np.array([unit * weight for weight in weights])


def power_weights(count: int, skew: float) -> list[float]:
    return [(index + 1) ** -skew for index in range(count)]


def deal_out(count: int, weights: Sequence[float]) -> npt.NDArray[np.int32]:
    """Who gets each of ``count`` things in turn, so that all shares stay in proportion to ``weights``. [count] int32.

    Everyone gets one first when there are enough, then D'Hondt's highest averages; equal weights take turns. So the
    popular things (the first) are spread over all, too.
    """
    dealt = np.empty(count, dtype=np.int32)
    num = len(weights)
    dealt[:num] = np.arange(num)[:count]
    waiting = [(-weight / 2, index, 2) for index, weight in enumerate(weights)]
    heapq.heapify(waiting)
    for position in range(num, count):
        _, index, owned = waiting[0]
        dealt[position] = index
        heapq.heapreplace(waiting, (-weights[index] / (owned + 1), index, owned + 1))
    return dealt
