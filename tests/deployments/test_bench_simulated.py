"""The simulator against a running platform with paced replicas, as the benchmark does it."""

import pytest
from loraplex_deployments.bench_simulated import Options, run

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_workload_on_both_sides() -> None:
    # Slow steps, so that a busy machine does not count in the time between tokens.
    result = run(Options(workloads=("flash-crowd",), seconds=8, replicas=2, gateways=3, adapters=2, factor=12))
    found = result["workloads"]["flash-crowd"]
    assert found["requests"] >= 8
    assert found["unanswered"] == 0
    figures = found["figures"]
    assert figures["tpot_p50_s"]["predicted"] > 0.07
    assert abs(figures["tpot_p50_s"]["difference"]) < 0.1
    assert figures["ttft_p50_s"]["measured"] > 0.5 * figures["ttft_p50_s"]["predicted"]
    assert "12 times slower" in result["executor"]
