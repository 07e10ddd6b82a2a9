"""The measurement of what telemetry costs: it traces what it says, and only in the runs with telemetry."""

import pytest
from loraplex.bench.telemetry_cost import Load, measure


def test_runs_with_and_without_differ_in_telemetry_alone() -> None:
    load = Load(
        model="random:tiny-llama",
        requests=3,
        prompt_tokens=8,
        output_tokens=8,
        pairs=1,
        sample_rate=1.0,
        scrape_s=0.01,
    )
    cost = measure(load)
    # A warm-up and one run with telemetry; the gateway's span, the replica's and the engine's four.
    assert cost.num_spans == 2 * 3 * 6
    assert cost.throughput_ratios == (cost.throughput_ratio,)
    assert cost.cpu_ratios == (cost.cpu_ratio,)
    assert cost.throughput_ratio == pytest.approx(cost.tokens_per_s_with / cost.tokens_per_s_without, rel=0.01)
