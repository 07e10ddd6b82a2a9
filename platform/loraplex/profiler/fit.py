"""Step timings in, coefficients out: non-negative least squares over relative errors.

Relative, so that a decode step of 6 ms counts as much as a prefill of 60. Of what a step takes by itself
(``fit_coefficients``): one that the system held up (garbage collection, another process), and the one behind it, whose
end was then seen too soon after, are weighed down as in Huber's estimator. What a step takes through all
stages of a pipeline (``fit_pipeline``) follows from its pace. Of what steps took in the mean (``fit_mean``): held-up
ones count like all others. Pure. Called by ``measure`` and ``simulated``.
"""

import msgspec
import numpy as np
from scipy.optimize import nnls

from loraplex.core.errors import BadConfig
from loraplex.cost.ceilings import FloatArray
from loraplex.cost.profile import HeldOutError
from loraplex.cost.step_cost import NUM_SCALARS, StepCoefficients, StepComposition, StepCost, features

TOKEN_KNOTS = (0.0, 16.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0)
"""Those below the largest step that was measured are used."""
_BOUND_TOKENS = 256
"""About where a step's time goes from reading weights to computing."""
_OF_PROMPTS = ("prefill_s", "prefill_row_s", "pair_s")
_FEWEST_LONE, _LARGE_SHARE, _SMALL_SHARE = 6, 0.3, 0.05
"""Lone steps with, and without, that much work of prompts, to tell how much faster a GPU does it that has rested."""
_ROUNDS = 40
_MEAN_ROUNDS = 8
_STRAY = 3.0
"""Times the median error: beyond it a step counts the less the farther it is off."""


def fit_coefficients(steps: StepComposition, seconds: FloatArray) -> StepCoefficients:
    """``seconds``: (S,), greater than 0, with S at least the number of coefficients. BadConfig when there are fewer."""
    knots, table = _table(steps)
    return _coefficients(_robust(table, seconds), knots)


def _robust(table: FloatArray, seconds: FloatArray) -> FloatArray:
    """The x >= 0 for which ``table`` @ x is ``seconds``, held-up steps aside."""
    weights = np.ones(len(seconds))
    scales = np.maximum(seconds, np.median(seconds))
    for _ in range(_ROUNDS):
        found = _solve(table / scales[:, None], seconds / scales, weights)
        expected = table @ found
        # Of both: against its own time alone, one step that was seen a millisecond long would outweigh a hundred.
        scales = np.maximum(seconds, expected)
        errors = np.abs(expected - seconds) / scales
        bound = _STRAY * max(float(np.median(errors)), 1e-9)
        weights = np.sqrt(np.minimum(1.0, bound / np.maximum(errors, 1e-12)))
    return found


def fit_pipeline(interval: StepCoefficients, steps: StepComposition, seconds: FloatArray, *, stages: int) -> StepCost:
    """The way through ``stages`` stages, each at the pace of ``interval``, but for the work of prompts: GPUs that rest
    between steps do it faster than in a row. ``steps``: each alone in the pipeline; ``seconds``: (S,), from their
    beginning to their tokens. What is left of steps without much of prompts is the host's (``StepCost.alone_s``).
    """
    prompts = _of_prompts(interval)
    prompts_s, interval_s = prompts.seconds(steps), interval.seconds(steps)
    large, small = prompts_s >= _LARGE_SHARE * interval_s, prompts_s <= _SMALL_SHARE * interval_s
    whole = StepCost(interval=interval, latency=interval.slowed(stages))
    if np.count_nonzero(small) < _FEWEST_LONE:
        return whole
    alone_s = max(0.0, float(np.median((seconds - stages * interval_s)[small])))
    if np.count_nonzero(large) < _FEWEST_LONE:
        return msgspec.structs.replace(whole, alone_s=alone_s)
    rest_s = stages * (interval_s - prompts_s)
    factor = float(np.median((seconds - rest_s - alone_s)[large] / prompts_s[large]))
    less = prompts.slowed(stages - min(max(factor, 1.0), stages))
    latency = msgspec.structs.replace(
        whole.latency,
        **{name: getattr(whole.latency, name) - getattr(less, name) for name in _OF_PROMPTS},
        token_slopes=tuple(a - b for a, b in zip(whole.latency.token_slopes, less.token_slopes, strict=True)),
    )
    return StepCost(interval=interval, latency=latency, alone_s=alone_s)


def _of_prompts(interval: StepCoefficients) -> StepCoefficients:
    """What prompts add to steps, tokens beyond the first ``_BOUND_TOKENS`` among it."""
    scalars = interval.__struct_fields__[:NUM_SCALARS]
    pairs = zip(interval.token_knots, interval.token_slopes, strict=True)
    return msgspec.structs.replace(
        interval,
        **dict.fromkeys(set(scalars) - set(_OF_PROMPTS), 0.0),
        token_slopes=tuple(slope if knot >= _BOUND_TOKENS else 0.0 for knot, slope in pairs),
    )


def fit_mean(steps: StepComposition, seconds: FloatArray) -> StepCoefficients:
    """As ``fit_coefficients``, but so that the steps of each kind together take what was measured.

    Errors count relative to the prediction: relative to what was measured, a slow step would count less than a quick
    one of the same kind, and the fit would lie below the mean of both.
    """
    knots, table = _table(steps)
    found = fit_coefficients(steps, seconds).array()
    found = np.delete(found, np.s_[NUM_SCALARS : NUM_SCALARS + len(knots)])
    for _ in range(_MEAN_ROUNDS):
        expected = np.maximum(table @ found, 1e-9)
        found = _solve(table / expected[:, None], seconds / expected, np.ones(len(steps)))
    return _coefficients(found, knots)


def _table(steps: StepComposition) -> tuple[tuple[float, ...], FloatArray]:
    """The knots in use, and what each coefficient is multiplied by."""
    most = float((steps.prefill_tokens + steps.decode_rows).max(initial=0.0))
    knots = tuple(knot for knot in TOKEN_KNOTS if knot == 0.0 or knot < most)
    table = features(steps, knots)
    if len(steps) < table.shape[1]:
        raise BadConfig(f"{len(steps)} steps are too few to fit {table.shape[1]} coefficients")
    return knots, table


def _solve(table: FloatArray, wanted: FloatArray, weights: FloatArray) -> FloatArray:
    """The x >= 0 for which ``table`` @ x is nearest to ``wanted``, (S,)."""
    scales = table.max(axis=0)
    scales[scales == 0.0] = 1.0
    solution, _ = nnls(table / scales * weights[:, None], wanted * weights)
    return np.asarray(solution / scales, dtype=np.float64)


def _coefficients(found: FloatArray, knots: tuple[float, ...]) -> StepCoefficients:
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
