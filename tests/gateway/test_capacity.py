"""The capacity command measures what it says: every token in an event of its own, for both protocols."""

from loraplex.bench.gateway_capacity import measure


def test_small_measurement() -> None:
    results = measure(streams=4, tokens=8)
    assert set(results) == {"http", "grpc"}
    for result in results.values():
        assert result.tokens == result.events == 32
        assert result.gateway_cpu_s > 0
        assert result.tokens_per_gateway_cpu_s > 0
