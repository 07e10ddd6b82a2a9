"""``python -m loraplex.model_runner.turns``: apart from the other tests of turns, whose processes need no torch."""

import pytest
from loraplex.model_runner.turns.cost import measure_turn_cost


@pytest.mark.slow
def test_what_turns_cost_is_measured_with_real_processes() -> None:
    cost = measure_turn_cost(num_turns=20)
    assert 0 < cost.alone_us < cost.bare_step_us
    assert 0 < cost.hand_over_us <= cost.hand_over_p99_us
    assert cost.shared_step_us > 0
