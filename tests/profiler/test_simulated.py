"""A running replica against the exact simulator; here the replica keeps the simulator's own times."""

import numpy as np
import pytest
from loraplex.core.errors import LoraplexError
from loraplex.core.ids import BaseModelId
from loraplex.cost.samples import Samples
from loraplex.engine import EngineConfig
from loraplex.profiler.engine_replay import AdapterFiles, EngineReplay
from loraplex.profiler.simulated import BASE, Options, rounds_of
from loraplex.simulator.scenarios import make_arrivals
from loraplex.simulator.types import ReplicaCost
from loraplex.testing.fake_executor import FakeExecutor, fake_model
from loraplex.testing.paced_config import PacedConfig
from loraplex.testing.paced_executor import build_paced_executor, paced_cost


@pytest.mark.alone
def test_the_real_engine_keeps_the_times_that_the_simulator_predicts() -> None:
    # Steps of 60 ms and more, so that a busy machine does not count.
    config, engine = PacedConfig(factor=10), EngineConfig(max_running=8, max_step_tokens=256)
    executor = build_paced_executor(config, model=fake_model(base_model_id=BASE), engine=engine, num_pages=4000)
    options = Options(adapters=2, output=8, load=0.5, seconds=6, rounds=1)
    cost, rounds = paced_cost(config, engine, BASE), []

    def fitted(steps: Samples) -> ReplicaCost:
        rounds.append(steps)
        return cost

    result = rounds_of(options, executor, cost, engine, fitted)
    # Every step of the round, at the executor's own times.
    (steps,) = rounds
    taken = np.array(steps.seconds)
    assert len(taken) > 50
    assert np.median(np.abs(cost.step.interval.seconds(steps.arrays()[0]) / taken - 1)) < 0.05
    (figures,) = result["rounds"]
    assert figures["tpot_p50_s"]["predicted"] > 0.06
    assert abs(figures["tpot_p50_s"]["error"]) < 0.1
    assert abs(figures["ttft_p50_s"]["error"]) < 0.15
    assert abs(figures["output_tokens_per_s"]["error"]) < 0.1
    # A lone request waits for little but its step, and the executor has one pace.
    assert 0 < result["hand_over_s"] < 0.03
    (slowness,) = result["slowness"]
    assert 0.9 < slowness["p10"] <= slowness["p50"] <= slowness["p90"] < 1.2
    assert result["slo"]["ttft_s"] > figures["ttft_p50_s"]["predicted"]
    assert result["median_error"]["tpot_p50_s"] == figures["tpot_p50_s"]["error"]


def test_a_request_that_fails_ends_the_run() -> None:
    files = AdapterFiles((), fake_model())
    replica = EngineReplay(FakeExecutor(num_pages=8), EngineConfig(), files)
    try:
        arrivals = make_arrivals(
            num_requests=1, rate=100, num_adapters=1, prompt=200, bases=(BaseModelId("fake-base"),)
        )
        arrivals.adapter[:] = -1
        with pytest.raises(LoraplexError, match="tokens"):
            replica.run(arrivals, {}, seed=0)
    finally:
        replica.close()
