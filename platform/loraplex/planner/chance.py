"""Whether one plan serves the same requests better than another by more than chance. Pure. Called by the controller's
planner and by benchmarks."""

import numpy as np
import numpy.typing as npt

_DRAWS = 2000
_INTERVAL = (2.5, 97.5)


def paired_interval(
    first: npt.NDArray[np.float64] | npt.NDArray[np.bool_],
    second: npt.NDArray[np.float64] | npt.NDArray[np.bool_],
    *,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % of a bootstrap's draws of how much larger the mean of ``first`` is. Both (R,), of the same R requests."""
    lost = first.astype(np.float64) - second
    # Few values that repeat: how often each is drawn says all.
    values, counts = np.unique(lost, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(lost), counts / len(lost), size=_DRAWS)
    low, high = np.percentile(drawn @ values / len(lost), _INTERVAL)
    return float(low), float(high)
