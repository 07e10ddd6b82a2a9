"""The study of LLM plans: hours made from functions and clients, tables that agree with the simulator."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from loraplex.core.errors import InvalidInput
from loraplex.core.ids import BaseModelId
from loraplex.planner.baselines import Baseline, selective
from loraplex.planner.study.hours import BaseTraffic, Functions, Hours, Recipe, build
from loraplex.planner.study.study import BAND, compared_rows, fewest_gpus, nodes, planned, problem_of, scaled
from loraplex.simulator.workload import Workload

DATA = Path(__file__).parents[1] / "traces" / "data" / "public"
LENGTHS = DATA / "servegen_length_quantiles.parquet"
B8, B70 = BaseModelId("llama3-8b"), BaseModelId("llama3-70b")
RECIPE = Recipe(
    traffic=(
        BaseTraffic(base=B8, num_adapters=10, pool="m-large"),
        BaseTraffic(base=B70, num_adapters=5, pool="m-large"),
    ),
    scale=20.0,
    minutes=2,
    shift_minutes=20,
)


@pytest.fixture(scope="module")
def functions() -> Functions:
    return Functions.read(DATA / "maf2019_minutes.parquet", left_out=2)


@pytest.fixture(scope="module")
def hours(functions: Functions) -> Hours:
    return build(functions, LENGTHS, RECIPE)


def test_adapters_play_functions_and_have_the_lengths_of_clients(functions: Functions, hours: Hours) -> None:
    assert [name.name for name in hours.planning.adapters[:1]] == ["llama3-8b-0000"]
    assert len(hours.planning.adapters) == len(hours.sizes) == 15
    assert len({size.lora_rank for size in hours.sizes}) > 1
    counts = functions.counts
    for arrivals, first in ((hours.planning, 0), (hours.following, 2)):
        assert np.all(np.diff(arrivals.arrival_s) >= 0)
        assert 0 <= arrivals.arrival_s[0] <= arrivals.arrival_s[-1] < 120
        assert np.array_equal(arrivals.base_model, np.where(arrivals.adapter < 10, 0, 1))
        assert arrivals.prompt_tokens.max() <= 7168
        asked = np.unique(arrivals.adapter)
        played = [
            adapter
            for adapter in range(10)
            if counts[adapter % len(counts), (np.arange(first, first + 2) + 20 * (adapter // len(counts))) % 60].any()
        ]
        assert set(asked[asked < 10].tolist()) <= set(played)
    again = build(functions, LENGTHS, RECIPE)
    assert np.array_equal(again.following.prompt_tokens, hours.following.prompt_tokens)
    more = build(functions, LENGTHS, replace(RECIPE, scale=40.0))
    assert len(more.planning) > 1.5 * len(hours.planning)


def test_a_record_that_is_too_short_or_no_record_is_refused(functions: Functions, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot play 15 adapters for two windows of 31 minutes"):
        build(functions, LENGTHS, replace(RECIPE, minutes=31))
    path = tmp_path / "x.parquet"
    path.write_bytes(b"x")
    with pytest.raises(InvalidInput, match=r"x\.parquet: expected function, minute, count, owner"):
        Functions.read(path)


def test_the_plan_keeps_its_time_and_the_table_is_what_the_simulator_says(hours: Hours) -> None:
    problem = problem_of(hours, num_gpus=8)
    ticks = iter(range(10**6))
    found, took_s = planned(problem, budget_s=60.0, clock=lambda: next(ticks) / 5)
    assert took_s <= 64
    assert found.evaluations < 300
    baseline, own = selective(problem)
    assert own.plan == baseline.plan
    ours, theirs = compared_rows(problem, found, [baseline], hours.following)
    assert (ours.policy, theirs.policy) == ("loraplex", "selective replication")
    assert ours.planning == found.attainment >= theirs.planning
    assert set(ours.by_base) <= {B8, B70}
    size = Workload.of(hours.following, problem.adapters).request_base
    weighted = sum(ours.by_base.get(base, 0.0) * float((size == i).mean()) for i, base in enumerate((B8, B70)))
    assert weighted == pytest.approx(ours.following)


def test_the_rate_is_scaled_until_the_best_baseline_is_in_its_band(functions: Functions) -> None:
    tried = []

    def tuned(problem: object) -> list[Baseline]:
        tried.append(problem)
        return [selective(problem_of(build(functions, LENGTHS, RECIPE), num_gpus=8))[0]]

    scale, problem, compared = scaled(
        lambda scale: problem_of(build(functions, LENGTHS, replace(RECIPE, scale=scale)), num_gpus=8),
        first=400.0,
        tuned=tuned,
    )
    assert scale < 400
    assert len(tried) > 1
    assert tried[-1] is problem
    assert len(compared) == 1
    assert BAND[0] < BAND[1]


def test_fewest_gpus_by_whole_nodes() -> None:
    assert fewest_gpus(lambda gpus: 0.9 + gpus / 1000, least=8, most=160) == (96, pytest.approx(0.996))
    assert fewest_gpus(lambda gpus: 0.5, least=8, most=64) == (None, 0.5)
    assert [node.num_gpus for node in nodes(20)] == [8, 8, 4]


def test_the_command_says_what_it_takes() -> None:
    command = [sys.executable, "-m", "loraplex.planner.study", "--help"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "--most-gpus" in said
