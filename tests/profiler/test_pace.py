"""A machine that is slower for a while: its pace is found, and the simulator keeps it."""

import dataclasses

import numpy as np
from loraplex.core.plan import BasePlacement, GroupPlan, Plan, Shape
from loraplex.engine import EngineConfig
from loraplex.loadgen.prediction import outcomes_of
from loraplex.profiler.pace import Pace, predicted_at
from loraplex.profiler.simulated import BASE
from loraplex.simulator.exact import simulate_exact
from loraplex.simulator.scenarios import make_arrivals
from loraplex.simulator.types import AdapterSize, CostKey, SimulationInput, Slo
from loraplex.testing.paced_config import PacedConfig
from loraplex.testing.paced_executor import paced_cost


def test_by_hand() -> None:
    # Two seconds at full speed, two at half, one without a step to speak of.
    pace = Pace.of(
        np.array([0.0, 1.5, 2.0, 4.9]),
        np.array([1.0, 0.5, 2.0, 0.05]),
        np.array([1.0, 0.5, 1.0, 0.5]),
        window_s=1.0,
    )
    assert pace.slowness.tolist() == [1.0, 1.0, 2.0, 2.0, 1.0]
    moments = np.array([0.0, 1.5, 2.0, 3.0, 4.0, 4.5, 5.0, 100.0])
    work = [0.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 99.0]
    np.testing.assert_allclose(pace.to_work(moments), work, atol=1e-6)
    np.testing.assert_allclose(pace.to_clock(np.array(work)), moments, atol=1e-6)


def test_a_step_counts_in_each_window_that_it_touches() -> None:
    pace = Pace.of(np.array([0.5]), np.array([2.0]), np.array([1.0]), window_s=1.0)
    assert pace.slowness.tolist() == [2.0, 2.0, 2.0]


def test_the_simulator_keeps_the_pace() -> None:
    config, engine = PacedConfig(), EngineConfig(max_running=8, max_step_tokens=256)
    arrivals = make_arrivals(
        num_requests=60, rate=40, num_adapters=1, num_tenants=2, prompt=60, output=8, bases=(BASE,), seed=0
    )
    key = CostKey(gpu="cpu", base_model_id=BASE, shape=Shape())
    group = GroupPlan(name="replica", shape=Shape(), gpu="cpu", bases=(BasePlacement(base_model_id=BASE),))
    given = SimulationInput(
        plan=Plan(version=1, groups=(group,)),
        arrivals=arrivals,
        adapters=tuple(AdapterSize(lora_rank=8) for _ in arrivals.adapters),
        costs={key: paced_cost(config, engine, BASE)},
        slo=Slo(),
        engine=engine,
    )
    expected = outcomes_of(given, simulate_exact(given))
    # All the time at half speed, and the arrivals come half as fast: everything takes twice as long.
    end_s = np.array([1e3])
    half = Pace.of(np.zeros(1), end_s, end_s / 2, window_s=1.0)
    stretched = dataclasses.replace(arrivals, arrival_s=2 * arrivals.arrival_s)
    found = predicted_at(half, dataclasses.replace(given, arrivals=stretched))
    np.testing.assert_allclose(found.ttft_s, 2 * expected.ttft_s, rtol=1e-6)
    np.testing.assert_allclose(found.tpot_s, 2 * expected.tpot_s, rtol=1e-6)
    np.testing.assert_allclose(found.at_s, stretched.arrival_s)
