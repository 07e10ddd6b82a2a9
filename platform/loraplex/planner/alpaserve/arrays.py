"""A problem as compiled code takes it. Made by ``evaluation``; read by ``counting``, ``proposals`` and ``anneal``."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from loraplex.simulator.alpaserve import Indices, Seconds, StageSeconds

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


class Arrays(NamedTuple):
    """A problem as compiled code takes it; names as in ``Problem``."""

    arrival_s: Seconds
    model: Indices
    slo_s: Seconds
    first: int
    """Requests in [first, last) count."""
    last: int
    num_gpus: Indices
    num_stages: Indices
    stage_s: StageSeconds
    weight_gib: Floats
    memory_gib: float
