"""The fit finds coefficients that are known, and is not led astray."""

import msgspec
import numpy as np
import pytest
from loraplex.core.errors import BadConfig
from loraplex.cost.ceilings import FloatArray
from loraplex.cost.step_cost import StepCoefficients, StepComposition
from loraplex.profiler.fit import TOKEN_KNOTS, fit_coefficients, fit_mean, fit_pipeline, held_out_error

TRUE = StepCoefficients(
    fixed_s=5.5e-3,
    prefill_s=1.5e-3,
    lora_s=3e-4,
    row_s=4e-6,
    prefill_row_s=5e-5,
    pair_s=1e-9,
    kv_token_s=4.5e-8,
    adapter_s=5e-6,
    adapter_byte_s=3.5e-13,
    lora_token_s=1.5e-6,
    token_knots=TOKEN_KNOTS,
    token_slopes=(0.0, 0.0, 0.0, 2e-5, 3e-5, 2.8e-5, 2.6e-5, 2.5e-5),
)


def _steps(count: int, seed: int) -> StepComposition:
    """Decode steps, with and without adapters, and every second one with prefill chunks."""
    random = np.random.default_rng(seed)
    decode = random.integers(1, 257, size=count).astype(float)
    chunks = random.integers(1, 9, size=count) * (random.random(count) < 0.5)
    chunk_tokens = random.integers(16, 400, size=count)
    start = random.integers(0, 1000, size=count)
    adapters = np.minimum(random.integers(0, 65, size=count) * (random.random(count) < 0.7), decode)
    ranks = random.choice([8, 16, 32, 64], size=count)
    tokens = chunks * chunk_tokens
    return StepComposition.of(
        prefill_rows=chunks,
        prefill_tokens=tokens,
        prefill_pairs=tokens * (start + chunk_tokens / 2),
        decode_rows=decode,
        kv_tokens=decode * random.integers(16, 2000, size=count) + chunks * (start + chunk_tokens),
        num_adapters=adapters,
        adapter_bytes=adapters * ranks * 5.2e6,
        lora_tokens=np.where(adapters > 0, np.maximum(adapters, decode // 2), 0),
    )


def _noisy(steps: StepComposition, seed: int) -> FloatArray:
    random = np.random.default_rng(seed)
    return TRUE.seconds(steps) * np.exp(random.normal(0.0, 0.02, size=len(steps)))


def test_exact_timings_give_the_coefficients_back() -> None:
    steps = _steps(600, 0)
    found = fit_coefficients(steps, TRUE.seconds(steps))
    np.testing.assert_allclose(found.array(), TRUE.array(), rtol=1e-3, atol=1e-12)


def test_noise_is_averaged_out() -> None:
    steps, unseen = _steps(2000, 1), _steps(500, 2)
    found = fit_coefficients(steps, _noisy(steps, 3))
    error = held_out_error(found, unseen, TRUE.seconds(unseen))
    assert error.steps == 500
    assert error.median < 0.003
    assert error.p90 < 0.01
    assert error.total < 0.003


def test_stray_steps_move_little() -> None:
    """One step in fifty takes ten times as long as it should."""
    steps, unseen = _steps(2000, 4), _steps(500, 5)
    seconds = _noisy(steps, 6)
    seconds[::50] *= 10.0
    error = held_out_error(fit_coefficients(steps, seconds), unseen, TRUE.seconds(unseen))
    assert error.median < 0.02
    assert error.total < 0.02


def test_steps_seen_too_short_behind_held_up_ones_move_little() -> None:
    """One in forty is seen 0.1 s late; its successor, which ran meanwhile, then ends at once."""
    steps, unseen = _steps(1000, 4), _steps(500, 5)
    seconds = _noisy(steps, 6)
    seconds[20::40] += 0.1
    seconds[21::40] = 1e-3
    error = held_out_error(fit_coefficients(steps, seconds), unseen, TRUE.seconds(unseen))
    assert error.median < 0.02
    assert error.p90 < 0.05
    assert error.total < 0.02


def test_the_mean_holds_what_held_steps_up_for_each_kind() -> None:
    """Every third decode step and every tenth other one takes half as long again."""
    steps = _steps(2000, 9)
    decodes = steps.prefill_rows == 0
    seconds = TRUE.seconds(steps)
    for kind, nth in ((decodes, 3), (~decodes, 10)):
        seconds[np.flatnonzero(kind)[::nth]] *= 1.5
    mean, typical = (fit(steps, seconds).seconds(steps) for fit in (fit_mean, fit_coefficients))
    for kind in (decodes, ~decodes):
        assert mean[kind].sum() == pytest.approx(seconds[kind].sum(), rel=0.01)
    # What a decode step takes by itself lies well below.
    assert typical[decodes].sum() < 0.92 * seconds[decodes].sum()


def _lone(factor: float, host_s: float) -> tuple[StepComposition, FloatArray]:
    """Steps through two stages that do the work of prompts in ``factor`` times what one takes in a row."""
    steps = _steps(300, 1)
    in_a_row = TRUE.seconds(steps)
    prompts = msgspec.structs.replace(
        TRUE,
        **dict.fromkeys(("fixed_s", "lora_s", "row_s", "kv_token_s", "adapter_s", "adapter_byte_s"), 0.0),
        lora_token_s=0.0,
        token_slopes=tuple(s if k >= 256 else 0.0 for k, s in zip(TRUE.token_knots, TRUE.token_slopes, strict=True)),
    ).seconds(steps)
    seconds = 2 * (in_a_row - prompts) + factor * prompts + host_s
    noise = np.random.default_rng(4).normal(0.0, 0.01, size=len(steps))
    seconds *= np.exp(noise)
    seconds[::50] *= 10
    return steps, seconds


@pytest.mark.parametrize(("factor", "host_s"), [(1.6, 0.0012), (2.0, 0.0), (1.2, 0.004)])
def test_rested_stages_take_less_for_prompts(factor: float, host_s: float) -> None:
    steps, seconds = _lone(factor, host_s)
    found = fit_pipeline(TRUE, steps, seconds, stages=2)
    assert found.alone_s == pytest.approx(host_s, abs=3e-4)
    held_up = np.zeros(len(steps), dtype=bool)
    held_up[::50] = True
    errors = np.abs(found.latency_s(steps) + host_s - seconds)[~held_up] / seconds[~held_up]
    assert np.median(errors) < 0.015
    assert np.percentile(errors, 90) < 0.04


@pytest.mark.parametrize("factor", [0.5, 1.6, 5.0])
def test_a_full_pipeline_keeps_its_pace(factor: float) -> None:
    """Through two stages no step takes more than two intervals, nor less than one."""
    steps, seconds = _lone(factor, 0.0012)
    found = fit_pipeline(TRUE, steps, seconds, stages=2).latency_s(steps)
    assert (found <= 2 * TRUE.seconds(steps) * (1 + 1e-9)).all()
    assert (found >= TRUE.seconds(steps) * (1 - 1e-9)).all()


def test_without_lone_prompts_each_stage_takes_an_interval() -> None:
    steps, seconds = _lone(1.6, 0.0)
    for few in (steps.prefill_rows == 0, np.arange(len(steps)) < 3):
        found = fit_pipeline(TRUE, steps.take(few), seconds[few], stages=2)
        np.testing.assert_allclose(found.latency.array(), TRUE.slowed(2).array())


def test_nothing_is_negative_where_time_falls_with_size() -> None:
    steps = _steps(300, 7)
    found = fit_coefficients(steps, 1e-2 / (1.0 + steps.kv_tokens))
    found.check("fit")
    assert found.kv_token_s == 0.0


def test_what_never_happened_costs_nothing() -> None:
    steps = StepComposition.of(decode_rows=np.arange(1.0, 60.0), kv_tokens=100.0 * np.arange(1.0, 60.0) ** 1.5)
    found = fit_coefficients(steps, TRUE.seconds(steps))
    assert found.adapter_byte_s == found.prefill_s == found.pair_s == 0.0
    assert found.token_knots == (0.0, 16.0)
    assert held_out_error(found, steps, TRUE.seconds(steps)).p90 < 1e-6


def test_too_few_steps() -> None:
    steps = _steps(5, 8)
    with pytest.raises(BadConfig, match="5 steps are too few"):
        fit_coefficients(steps, TRUE.seconds(steps))


def test_held_out_error_by_hand() -> None:
    steps = StepComposition.of(decode_rows=[1.0, 1.0, 1.0])
    error = held_out_error(StepCoefficients(fixed_s=1.0), steps, np.array([1.0, 2.0, 0.8]))
    assert (error.median, error.total) == (pytest.approx(0.25), pytest.approx(0.8 / 3.8))
