"""Step timings in, coefficients out: non-negative least squares over relative errors, robust against stray steps.

Relative, so that a decode step of 6 ms counts as much as a prefill of 60. A step that the system held up (garbage
collection, another process) is weighed down as in Huber's estimator. Pure. Called by ``measure``.
"""

import numpy as np
from scipy.optimize import nnls

from loraplex.core.errors import BadConfig
from loraplex.cost.ceilings import FloatArray
from loraplex.cost.profile import HeldOutError
from loraplex.cost.step_cost import NUM_SCALARS, StepCoefficients, StepComposition, features

TOKEN_KNOTS = (0.0, 16.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0)
"""Those below the largest step that was measured are used."""
_ROUNDS = 8
_STRAY = 3.0
"""Times the median error: beyond it a step counts the less the farther it is off."""


def fit_coefficients(steps: StepComposition, seconds: FloatArray) -> StepCoefficients:
    """``seconds``: (S,), greater than 0, with S at least the number of coefficients. BadConfig when there are fewer."""
    most = float((steps.prefill_tokens + steps.decode_rows).max(initial=0.0))
    knots = tuple(knot for knot in TOKEN_KNOTS if knot == 0.0 or knot < most)
    table = features(steps, knots)
    if len(steps) < table.shape[1]:
        raise BadConfig(f"{len(steps)} steps are too few to fit {table.shape[1]} coefficients")
    relative = table / seconds[:, None]
    scales = relative.max(axis=0)
    scales[scales == 0.0] = 1.0
    matrix = relative / scales
    weights = np.ones(len(steps))
    for _ in range(_ROUNDS):
        solution, _ = nnls(matrix * weights[:, None], weights)
        errors = np.abs(matrix @ solution - 1.0)
        bound = _STRAY * max(float(np.median(errors)), 1e-9)
        weights = np.sqrt(np.minimum(1.0, bound / np.maximum(errors, 1e-12)))
    found = solution / scales
    return StepCoefficients.from_array(np.concatenate([found[:NUM_SCALARS], knots, found[NUM_SCALARS:]]))


def held_out_error(coefficients: StepCoefficients, steps: StepComposition, seconds: FloatArray) -> HeldOutError:
    """Over steps (at least one) that ``coefficients`` were not fitted to."""
    predicted = coefficients.seconds(steps)
    errors = np.abs(predicted - seconds) / seconds
    return HeldOutError(
        steps=len(steps),
        median=float(np.median(errors)),
        p90=float(np.percentile(errors, 90)),
        total=float(abs(predicted.sum() - seconds.sum()) / seconds.sum()),
    )
