import pytest
from loraplex.bench.scheduler_cost import measure


@pytest.mark.alone
@pytest.mark.parametrize("adapters", [0, 3])
def test_only_steps_in_which_all_rows_decode_are_timed(adapters: int) -> None:
    cost = measure(rows=5, adapters=adapters, steps=40, prompt_tokens=600)
    assert (cost.rows, cost.steps) == (5, 40)
    assert 0 < cost.schedule_us < cost.step_us
    assert 0 < cost.complete_us < cost.step_us
