"""Coefficients: features, the flat array, the function for compiled code, and rows summed into compositions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex.core.errors import BadConfig
from loraplex.cost.step_cost import NUM_SCALARS, StepCoefficients, StepComposition, StepCost, step_seconds

COEFFICIENTS = StepCoefficients(
    fixed_s=5e-3,
    prefill_s=1e-3,
    lora_s=2e-4,
    row_s=1e-6,
    prefill_row_s=3e-5,
    pair_s=1e-9,
    kv_token_s=4e-8,
    adapter_s=2e-6,
    adapter_byte_s=3e-13,
    lora_token_s=1e-6,
    token_knots=(0.0, 160.0, 512.0),
    token_slopes=(1e-6, 3e-5, 2.5e-5),
)
_count = st.integers(0, 5000)


@given(st.lists(st.tuples(*[_count] * 8), min_size=1, max_size=6))
def test_the_scalar_function_is_the_vectorised_one(steps: list[tuple[int, ...]]) -> None:
    columns = np.array(steps, dtype=np.float64).T
    names = StepComposition.__slots__
    together = COEFFICIENTS.seconds(StepComposition.of(**dict(zip(names, columns, strict=True))))
    alone = [step_seconds(COEFFICIENTS.array(), *(float(value) for value in step)) for step in steps]
    np.testing.assert_allclose(together, alone, rtol=1e-12)


def test_by_hand() -> None:
    decode = StepComposition.of(decode_rows=8, kv_tokens=8 * 100, num_adapters=2, adapter_bytes=1e8, lora_tokens=4)
    expected = 5e-3 + 2e-4 + 8e-6 + 800 * 4e-8 + 2 * 2e-6 + 1e8 * 3e-13 + 4e-6 + 8e-6
    assert COEFFICIENTS.seconds(decode).tolist() == [pytest.approx(expected)]
    prefill = StepComposition.of(prefill_rows=1, prefill_tokens=1000, prefill_pairs=1000 * 1001 / 2, kv_tokens=1000)
    curve = 160 * 1e-6 + (512 - 160) * 3e-5 + (1000 - 512) * 2.5e-5
    expected = 5e-3 + 1e-3 + 1e-6 + 3e-5 + 500_500 * 1e-9 + 1000 * 4e-8 + curve
    assert COEFFICIENTS.seconds(prefill).tolist() == [pytest.approx(expected)]


def test_array_round_trip() -> None:
    values = COEFFICIENTS.array()
    assert values.shape == (NUM_SCALARS + 2 * 3,)
    assert StepCoefficients.from_array(values) == COEFFICIENTS


def test_a_run_of_decode_steps_is_an_arithmetic_series() -> None:
    steps = StepComposition.of(decode_rows=16, kv_tokens=np.arange(1600.0, 3200.0, 16.0))
    assert np.ptp(np.diff(COEFFICIENTS.seconds(steps))) < 1e-15


def test_rows_are_summed_by_step(llama_8b) -> None:
    """A chunk of 3 after 10, a decode at 7, both of adapter 1; then one decode each of adapters 0 and 1, one base."""
    steps = StepComposition.of_rows(
        llama_8b,
        step=np.array([0, 0, 1, 1, 1]),
        start=np.array([10, 7, 4, 5, 6]),
        num_tokens=np.array([3, 1, 1, 1, 1]),
        adapter=np.array([1, 1, 0, 1, -1]),
        adapter_bytes=np.array([100.0, 1000.0]),
        num_steps=2,
    )
    assert steps.prefill_rows.tolist() == [1, 0]
    assert steps.prefill_tokens.tolist() == [3, 0]
    assert steps.prefill_pairs.tolist() == [11 + 12 + 13, 0]
    assert steps.decode_rows.tolist() == [1, 3]
    assert steps.kv_tokens.tolist() == [13 + 8, 5 + 6 + 7]
    assert steps.num_adapters.tolist() == [1, 2]
    assert steps.adapter_bytes.tolist() == [1000, 1100]
    assert steps.lora_tokens.tolist() == [4, 2]
    assert StepComposition.joined([steps.take(np.array([1])), steps]).lora_tokens.tolist() == [2, 4, 2]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"kv_token_s": -1.0}, "kv_token_s"),
        ({"fixed_s": float("nan")}, "fixed_s"),
        ({"token_slopes": (1.0, 1.0)}, "token_knots"),
        ({"token_knots": (0.0, 5.0, 5.0)}, "token_knots"),
        ({"token_knots": (1.0, 5.0, 6.0)}, "token_knots"),
    ],
)
def test_unsound_coefficients(change: dict[str, object], key: str) -> None:
    values = {name: getattr(COEFFICIENTS, name) for name in StepCoefficients.__struct_fields__} | change
    with pytest.raises(BadConfig, match=rf"^here\.{key}: "):
        StepCoefficients(**values).check("here")


def test_interval_and_latency() -> None:
    slow = StepCoefficients(fixed_s=3.0)
    cost = StepCost(interval=COEFFICIENTS, latency=slow)
    steps = StepComposition.of(decode_rows=1)
    assert cost.latency_s(steps).tolist() == [3.0]
    assert cost.interval_s(steps).tolist() == COEFFICIENTS.seconds(steps).tolist()
