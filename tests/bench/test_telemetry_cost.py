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
    # A warm-up and one run with telemetry: the gateway's span, the replica's and the engine's four. Requests that are
    # only counted and traced have the gateway's, as far as the queue of spans held them.
    assert cost.num_spans >= 2 * 3 * 6
    assert cost.throughput_ratios == (cost.throughput_ratio,)
    assert cost.cpu_ratios == (cost.cpu_ratio,)
    assert cost.throughput_ratio == pytest.approx(cost.tokens_per_s_with / cost.tokens_per_s_without, rel=0.01)


@pytest.mark.alone
def test_what_it_does_for_an_engine_at_full_speed_is_little() -> None:
    """An H100 at 10,000 tokens/s: 78 requests of 128 tokens and 125 steps a second, read each second."""
    parts = measure(
        Load(
            model="random:tiny-llama",
            requests=1,
            prompt_tokens=4,
            output_tokens=2,
            pairs=1,
            sample_rate=0.01,
            scrape_s=1.0,
        )
    ).parts
    assert min(parts.us_per_request, parts.us_per_step, parts.us_per_scrape) > 0
    assert parts.share(requests_per_s=78, steps_per_s=125, scrapes_per_s=1) < 0.02
