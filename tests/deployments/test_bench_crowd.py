"""The measurements of a flash crowd and of a greedy tenant: what their figures say, and small ones on a platform."""

import msgspec
import numpy as np
import pytest
from loraplex.engine import EngineConfig
from loraplex.loadgen.outcomes import Outcomes
from loraplex.router.config import RouterConfig
from loraplex.traces.arrivals import Arrivals
from loraplex_deployments import bench_crowd, bench_greedy
from loraplex_deployments.bench_crowd import CrowdOptions, is_hot, run_crowd_bench
from loraplex_deployments.bench_greedy import GreedyOptions, of_one_tenant, run_greedy_bench
from loraplex_deployments.bench_tenants import TenantSetup


def outcomes(arrivals: Arrivals, ttft_s: np.ndarray) -> Outcomes:  # type: ignore[type-arg]
    return Outcomes(
        at_s=arrivals.arrival_s,
        tenants=arrivals.tenants,
        tenant=arrivals.tenant,
        ttft_s=ttft_s,
        tpot_s=np.where(np.isfinite(ttft_s), 0.01, np.inf),
    )


def test_figures_of_a_crowd() -> None:
    options = CrowdOptions(span_s=20.0)
    arrivals = bench_crowd.arrivals_of(options)
    crowd, hot = arrivals.arrival_s >= 40.0, is_hot(arrivals)
    assert (crowd & hot).sum() > (crowd & ~hot).sum() > 10 * (~crowd & hot).sum() / 2
    ttft_s = np.where(crowd, np.where(hot, np.inf, 0.2), 0.1)
    found = bench_crowd.figures_of(outcomes(arrivals, ttft_s), arrivals, options)
    assert found.calm_attainment == found.others_attainment == 1.0
    assert found.hot_attainment == 0.0
    assert found.attainment == pytest.approx((crowd & ~hot).sum() / crowd.sum())
    assert found.others_ratio == pytest.approx(2.0)
    assert found.ttft_p99_s == np.inf
    assert found.unanswered == (crowd & hot).sum()


def test_figures_of_a_greedy_tenant() -> None:
    options = GreedyOptions()
    arrivals = bench_greedy.arrivals_of(options)
    greedy = arrivals.tenant == arrivals.tenants.index("greedy")
    everything = bench_greedy.figures_of(outcomes(arrivals, np.ones(len(greedy))), arrivals, options)
    assert everything.least_of_others == everything.jain_index == 1.0
    refused = np.where(greedy & (np.arange(len(greedy)) % 4 > 0), np.inf, 1.0)
    found = bench_greedy.figures_of(outcomes(arrivals, refused), arrivals, options)
    assert found.least_of_others == found.jain_index == 1.0
    assert found.tenants["greedy"].ratio == pytest.approx(1.0)
    assert found.tenants["greedy"].served == pytest.approx(found.tenants["greedy"].asked / 4, rel=0.2)
    one = arrivals.tenant == arrivals.tenants.index("calm2")
    found = bench_greedy.figures_of(outcomes(arrivals, np.where(one, np.inf, refused)), arrivals, options)
    assert found.least_of_others == found.tenants["calm2"].ratio == 0.0
    assert found.jain_index == pytest.approx(6 / 7)
    together = of_one_tenant(arrivals)
    assert {adapter.tenant for adapter in together.adapters} == set(together.tenants)
    assert np.array_equal(together.adapter, arrivals.adapter)


@pytest.mark.ray
@pytest.mark.slow
def test_a_crowd_on_a_platform() -> None:
    options = CrowdOptions(
        setup=TenantSetup(replicas=2, gateways=2, factor=8.0),
        policies=("consistent-hash",),
        span_s=4.0,
        hot_rate=0.5,
        other_rate=4.0,
        adapters=6,
        tenants=3,
    )
    result = run_crowd_bench(options)
    (found,) = result.policies
    assert found.errors == {}
    assert found.measured.unanswered == 0
    assert result.requests > result.crowd_requests > 0
    assert found.measured.ttft_p50_s > 0.5 * found.simulated.ttft_p50_s > 0.0
    assert found.measured.tpot_p50_s == pytest.approx(found.simulated.tpot_p50_s, rel=0.3)


@pytest.mark.ray
@pytest.mark.slow
def test_a_greedy_tenant_on_a_platform() -> None:
    options = GreedyOptions(
        setup=TenantSetup(
            replicas=1,
            factor=16.0,
            engine=EngineConfig(max_running=16, max_waiting=4),
            router=RouterConfig(max_queued_requests=32, max_queue_wait_s=10.0),
        ),
        share_per_s=0.7,
        asked=(0.8, 0.8),
        adapters_per_tenant=1,
        begin_s=5.0,
        end_s=25.0,
    )
    result = run_greedy_bench(options)
    assert result.by_tenant.measured.least_of_others > 0.9
    assert result.first_come.measured.least_of_others < 0.7
    assert set(result.first_come.errors) == {"429"}
    assert msgspec.json.decode(msgspec.json.encode(result), type=bench_greedy.GreedyResult) == result
