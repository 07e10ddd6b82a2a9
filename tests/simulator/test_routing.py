"""The simulators with other policies, and what the studies say of them."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from loraplex.core.errors import InvalidInput
from loraplex.engine import EngineConfig
from loraplex.router.config import RouterConfig
from loraplex.simulator import fast, routing_study
from loraplex.simulator.crowds import GREEDY, greedy_tenant
from loraplex.simulator.exact import simulate_exact
from loraplex.simulator.scenarios import make_arrivals, make_input
from loraplex.simulator.types import Outcome, SimulationInput, SimulationResult


def _overloaded(router: RouterConfig) -> SimulationInput:
    arrivals = make_arrivals(num_requests=500, rate=120, num_adapters=16, num_tenants=4)
    given = make_input(arrivals, num_groups=2)
    engine = type(given.engine)(max_running=16, max_waiting=4)
    return dataclasses.replace(given, engine=engine, router=router)


def test_other_policies_run_in_the_exact_simulator_alone() -> None:
    given = dataclasses.replace(routing_study.flash_crowd(0), router=RouterConfig(policy="consistent-hash"))
    with pytest.raises(InvalidInput, match="consistent-hash"):
        fast.simulate(given)
    arrivals = make_arrivals(num_requests=60, rate=100, num_adapters=1)
    given = dataclasses.replace(make_input(arrivals, num_groups=3), router=given.router)
    assert len(set(simulate_exact(given).group.tolist())) == 1
    given = dataclasses.replace(given, router=RouterConfig(policy="least-loaded"))
    assert len(set(simulate_exact(given).group.tolist())) == 3


@pytest.mark.parametrize("patience", [1.0, 3.0])
def test_what_cannot_be_served_in_time_is_refused_in_both_simulators(patience: float) -> None:
    impatient = _overloaded(RouterConfig(ttft_slo_s=1.0, ttft_patience=patience))
    patient = simulate_exact(_overloaded(RouterConfig()))
    exact, ours = simulate_exact(impatient), fast.simulate(impatient)
    assert patient.score.num_served == 500
    for result in (exact, ours):
        assert 0 < (result.outcome == Outcome.REFUSED).sum() < 400
        assert result.score.ttft_s["p50"] < patience < patient.score.ttft_s["p50"]
    assert exact.score.num_served == pytest.approx(ours.score.num_served, rel=0.1)
    assert exact.score.ttft_s["mean"] == pytest.approx(ours.score.ttft_s["mean"], rel=0.1)


@pytest.mark.parametrize("simulate", [simulate_exact, fast.simulate])
def test_answers_shorter_than_expected_give_nobody_the_turns_of_others(
    simulate: Callable[[SimulationInput], SimulationResult],
) -> None:
    arrivals = greedy_tenant(
        seed=0, end_s=3.0, share_per_s=12.0, asked=(0.8, 0.8), greedy_factor=10.0, adapters_per_tenant=1, output=48.0
    )
    given = make_input(arrivals, num_groups=1, engine=EngineConfig(max_running=16, max_waiting=4))
    given = dataclasses.replace(
        given,
        router=RouterConfig(max_queued_requests=32, max_queue_wait_s=1.0, expected_output_tokens=1024.0),
    )
    refused = arrivals.tenant[simulate(given).outcome == Outcome.REFUSED]
    assert len(refused) > 100
    assert (refused == arrivals.tenants.index(GREEDY)).all()


def test_a_full_queue_is_shared_among_tenants_in_both_simulators() -> None:
    given = routing_study.greedy_tenant(0)
    given = dataclasses.replace(given, router=RouterConfig(max_queued_requests=64), score_from_s=2.0, score_until_s=6.0)
    arrivals = given.arrivals
    few = arrivals.arrival_s < 6.0
    cut = {
        name: getattr(arrivals, name)[few]
        for name in ("arrival_s", "adapter", "base_model", "tenant", "prompt_tokens", "output_tokens")
    }
    given = dataclasses.replace(given, arrivals=dataclasses.replace(arrivals, **cut))
    greedy = given.arrivals.tenants.index("greedy")
    for simulate in (simulate_exact, fast.simulate):
        refused = simulate(given).outcome == Outcome.REFUSED  # type: ignore[operator]
        by_tenant = np.bincount(given.arrivals.tenant[refused], minlength=routing_study.NUM_TENANTS)
        assert by_tenant[greedy] == by_tenant.sum() > 50
