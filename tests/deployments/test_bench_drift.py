"""``loraplex bench drift``: the same arrivals with a plan that stays and with plans that follow the traffic."""

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from loraplex.cli.main import app
from loraplex.controller.fleet.config import PlanningConfig
from loraplex.core.plan_check import check_form
from loraplex_deployments.bench_drift import DriftOptions, drift_arrivals, run_drift_bench, static_plan
from loraplex_deployments.replan_setup import TENANT, ReplanBase, ReplanSetup, platform_config
from typer.testing import CliRunner


def _setup(**fields: object) -> ReplanSetup:
    planning = PlanningConfig(
        profiles=("h100-80gb",),
        interval_s=4.0,
        window_s=10.0,
        min_requests=10,
        ttft_s=3.0,
        tpot_s=0.17,
        max_evaluations=40,
        min_gain=0.02,
    )
    bases = (ReplanBase(name="first"), ReplanBase(name="second"))
    made = ReplanSetup(bases=bases, planning=planning, adapters_per_base=8, first_token_deadline_s=3600.0)
    return msgspec.structs.replace(made, **fields)


def test_popularity_rotates_over_bases_and_adapters() -> None:
    options = DriftOptions(setup=_setup(), rotate_s=60.0, phases=3, rate=20.0)
    arrivals = drift_arrivals(options)
    assert {(name.tenant, name.base_model) for name in arrivals.adapters} == {
        (str(TENANT), "first"),
        (str(TENANT), "second"),
    }
    hottest = []
    for phase in range(3):
        rows = (arrivals.arrival_s >= 60 * phase) & (arrivals.arrival_s < 60 * (phase + 1))
        own = arrivals.base_model[rows] == phase % 2
        assert own.mean() > 0.65
        hottest.append(arrivals.adapters[np.bincount(arrivals.adapter[rows]).argmax()])
    assert [name.base_model for name in hottest] == ["first", "second", "first"]
    assert hottest[0] != hottest[2]
    for adapter, base in zip(arrivals.adapter.tolist(), arrivals.base_model.tolist(), strict=True):
        assert arrivals.adapters[adapter].base_model == arrivals.base_models[base]


def test_the_plan_that_stays_is_planned_on_all_of_it() -> None:
    options = DriftOptions(setup=_setup(), rotate_s=20.0, phases=2, rate=4.0, evaluations=5)
    plan, attained = static_plan(options, drift_arrivals(options))
    check_form(plan)
    assert {placed.base_model_id for group in plan.groups for placed in group.bases} == {"first", "second"}
    assert 0.3 < attained <= 1


def test_replicas_on_gpus_compute(tmp_path: Path) -> None:
    bases = (ReplanBase(name="first", model="random:llama3-8b"),)
    setup = _setup(factor=None, bases=bases, nodes=1, gpus_per_node=2)
    config = platform_config(setup, tmp_path, address="127.0.0.1:1", ports=(1, 2), mode="off")
    (base,) = config.base_models
    assert (base.paced, base.executor.device, base.num_gpus, base.replicas) == (None, "cuda", 1, 0)
    assert setup.executor == "random:llama3-8b"
    assert setup.accelerator == "H100"
    paced = platform_config(_setup(), tmp_path, address="127.0.0.1:1", ports=(1, 2), mode="auto")
    assert paced.base_models[0].paced is not None
    assert paced.controller.fleet.planning.profile_bases == {"first": "llama3-8b", "second": "llama3-8b"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--adapters", "3"], "3 adapters for 2 bases"),
        (["--gpus", "3"], "3 on two nodes"),
        (["--ranks", "x"], "numbers with commas between"),
    ],
)
def test_bad_options_are_one_line(options: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["bench", "drift", *options])
    assert result.exit_code == 2
    assert said in result.output


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_both_runs_answer_every_request() -> None:
    options = DriftOptions(setup=_setup(), rotate_s=15.0, phases=2, rate=4.0, evaluations=20)
    said: list[str] = []
    result = run_drift_bench(options, said.append)
    assert result.static.requests == result.live.requests == len(drift_arrivals(options))
    assert (result.static.failed, result.live.failed) == (0, 0)
    assert result.static.decisions == ()
    assert result.live.decisions
    assert result.gain == pytest.approx(result.live.attainment - result.static.attainment)
    assert result.gain_interval[0] <= result.gain <= result.gain_interval[1]
    assert json.loads(msgspec.json.encode(result))["share_by_phase"][0][0] > 0.6
