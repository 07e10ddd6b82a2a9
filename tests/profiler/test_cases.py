"""The grid stays within its limits and covers what the fit needs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex.profiler.cases import Limits, grid, held_out, lone_prompts

_LIMITS = st.builds(
    Limits,
    max_running=st.integers(1, 300),
    max_request_tokens=st.integers(8, 20_000),
    max_kv_tokens=st.integers(2_000, 500_000),
    num_adapters=st.integers(0, 80),
)


@given(_LIMITS, st.integers(0, 5))
def test_limits_hold(limits: Limits, seed: int) -> None:
    for case in (*grid(limits, seed=seed), *held_out(limits, seed=seed)):
        longest = max(case.input_tokens) + max(case.output_tokens)
        assert 1 <= case.concurrency <= limits.max_running
        assert longest <= limits.max_request_tokens
        assert case.concurrency * longest <= limits.max_kv_tokens
        assert min(case.adapters) >= -1
        assert max(case.adapters) < limits.num_adapters
        assert min(case.input_tokens) >= 1
        assert min(case.output_tokens) >= 1
        assert len(case.input_tokens) == len(case.output_tokens) == len(case.adapters) >= max(4, case.concurrency)
        assert len(case.adapters) <= max(4, 2 * case.concurrency)
        # More than run at a time only where that is not long.
        assert len(case.adapters) in (4, case.concurrency) or case.num_tokens < 1 << 18


@given(_LIMITS, st.integers(0, 5))
def test_lone_prompts_are_one_at_a_time_and_as_long_as_there_is_room_for(limits: Limits, seed: int) -> None:
    case = lone_prompts(limits, seed=seed)
    assert (case.concurrency, set(case.adapters), len(case.input_tokens)) == (1, {-1}, 12)
    longest = max(case.input_tokens) + max(case.output_tokens)
    assert longest <= min(limits.max_request_tokens, limits.max_kv_tokens)
    assert max(case.output_tokens) <= 2
    assert max(case.input_tokens) >= min(limits.max_request_tokens, limits.max_kv_tokens, 2048) // 3


@pytest.mark.parametrize("max_running", [16, 256])
def test_the_grid_has_every_kind_of_load(max_running: int) -> None:
    limits = Limits(max_running=max_running, max_request_tokens=8192, max_kv_tokens=400_000, num_adapters=64)
    cases = grid(limits)
    assert {1, 4, max_running} <= {case.concurrency for case in cases}
    distinct = {len(set(case.adapters) - {-1}) for case in cases}
    assert {0, 1, min(64, max_running)} <= distinct
    assert any(-1 in case.adapters and max(case.adapters) > 0 for case in cases)
    assert max(max(case.input_tokens) for case in cases) > 4096
    assert len(cases) == len(set(cases))


def test_seeds() -> None:
    limits = Limits(max_running=8, max_request_tokens=512, max_kv_tokens=20_000, num_adapters=4)
    assert grid(limits, seed=3) == grid(limits, seed=3)
    assert grid(limits, seed=3) != grid(limits, seed=4)
    assert not set(held_out(limits)) & set(grid(limits))
