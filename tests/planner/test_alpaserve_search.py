"""The search under AlpaServe's contract, on recorded cases and on problems small enough to try every placement."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from loraplex.cli.main import app
from loraplex.core.errors import InvalidInput
from loraplex.planner.alpaserve.baseline import alpaserve_search
from loraplex.planner.alpaserve.bound import goodput_bound
from loraplex.planner.alpaserve.problem import Placement, Problem, from_groups, to_groups
from loraplex.planner.alpaserve.replan import replan
from loraplex.planner.alpaserve.search import plan
from loraplex.simulator.alpaserve import Group, Layout, StageProfile, Work, goodput, memory_gib, simulate
from loraplex.simulator.alpaserve_cases import Case, load_cases
from typer.testing import CliRunner

CASES_PATH = Path(__file__).parents[1] / "simulator" / "data" / "alpaserve" / "cases.json"
PROFILES = {
    ("short", Layout(1, 1, 1)): StageProfile(latency_s=(0.1,), weight_gib=(2.0,)),
    ("short", Layout(1, 1, 2)): StageProfile(latency_s=(0.05, 0.05), weight_gib=(1.0, 1.0)),
    ("long", Layout(1, 1, 1)): StageProfile(latency_s=(0.5,), weight_gib=(4.0,)),
    ("long", Layout(1, 1, 2)): StageProfile(latency_s=(0.25, 0.25), weight_gib=(2.0, 2.0)),
    ("long", Layout(1, 2, 1)): StageProfile(latency_s=(0.6,), weight_gib=(2.0,)),
}


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return {case.name: case for case in load_cases(CASES_PATH)}


def _problem(case: Case) -> Problem:
    return Problem.of(
        case.training_work(),
        case.profiles,
        num_devices=case.num_devices,
        devices_per_node=case.devices_per_node,
        memory_gib=case.memory_gib,
    )


def _small(seed: int = 0, rate: float = 6.0) -> Problem:
    random = np.random.default_rng(seed)
    arrival_s = np.sort(random.uniform(0, 60, int(60 * rate)))
    work = Work(
        model_types=("short", "short", "long"),
        slo_s=np.array([0.3, 0.3, 1.2]),
        arrival_s=arrival_s,
        model=random.choice(3, p=[0.5, 0.3, 0.2], size=len(arrival_s)).astype(np.int32),
    )
    return Problem.of(work, PROFILES, num_devices=2, devices_per_node=2, memory_gib=4.0)


def _every_placement(problem: Problem) -> float:
    """The best goodput there is, by trying all."""
    best = 0.0
    for sizes in ((1, 1), (2,)):
        per_group = [
            [
                Group(layout, models)
                for layout in problem.layouts
                if layout.num_gpus == size
                for models in (tuple(np.flatnonzero(bits).tolist()) for bits in product((0, 1), repeat=3))
                if all((problem.work.model_types[model], layout) in PROFILES for model in models)
                and memory_gib(problem.work, Group(layout, models), PROFILES) <= problem.memory_gib
            ]
            for size in sizes
        ]
        for groups in product(*per_group):
            ordered = sorted((group for group in groups if group.models), key=lambda group: group.models)
            if ordered:
                best = max(best, goodput(problem.work, simulate(problem.work, ordered, PROFILES)))
    return best


@pytest.mark.parametrize("seed", range(4))
def test_small_problems_are_solved_to_the_best_placement_there_is(seed: int) -> None:
    problem = _small(seed)
    found = plan(problem, evaluations=600, seed=seed)
    reached = goodput(problem.work, simulate(problem.work, found.groups, PROFILES))
    best = _every_placement(problem)
    assert reached == best
    assert goodput_bound(problem) >= best


def test_what_the_search_counts_is_what_the_contract_gives(cases: dict[str, Case]) -> None:
    for name in ("bert42_g16_r64_cv4_slo5", "early13b_m8_g8_r40"):
        problem = _problem(cases[name])
        found = plan(problem, evaluations=300)
        accepted = simulate(problem.work, found.groups, cases[name].profiles)
        assert found.num_good == np.count_nonzero(accepted[problem.work.scored()])
        assert found.evaluations <= 310


def test_a_small_budget_already_beats_alpaserve_where_it_loses_most(cases: dict[str, Case]) -> None:
    for name in ("bert42_g24_r64_cv4_slo5", "bert42_g16_r64_cv4_slo5"):
        case = cases[name]
        problem = _problem(case)
        found = plan(problem, evaluations=2000)
        recorded = max(case.policies[key].goodput or 0.0 for key in ("mp-search", "mp-search-sep"))
        reached = goodput(case.test_work(), simulate(case.test_work(), found.groups, case.profiles))
        assert recorded < reached <= goodput_bound(problem.on(case.test_work()))


def test_every_plan_fits_memory_devices_and_nodes(cases: dict[str, Case]) -> None:
    for name in ("early13b_m32_g16_r40_cv4_slo2", "mix60_g32_r16_cv4_slo5", "fork_m16_g16_r40_cv4_slo5"):
        case = cases[name]
        problem = _problem(case)
        for groups in (plan(problem, evaluations=150, seed=3).groups, alpaserve_search(problem)):
            assert problem.is_feasible(groups)
            assert sum(group.layout.num_gpus for group in groups) <= case.num_devices
            for group in groups:
                assert memory_gib(problem.work, group, case.profiles) <= case.memory_gib + 1e-9
                assert group.layout.op <= case.devices_per_node


def test_shards_over_pcie_that_slow_a_model_down_are_not_chosen(cases: dict[str, Case]) -> None:
    case = cases["fork_m16_g16_r20_cv4_slo5"]
    assert any(layout.op > 1 for layout in _problem(case).layouts)
    assert all(group.layout.op == 1 for group in plan(_problem(case), evaluations=800).groups)


def test_the_same_seed_and_budget_give_the_same_plan(cases: dict[str, Case]) -> None:
    problem = _problem(cases["early13b_m8_g8_r20"])
    first, again = plan(problem, evaluations=500, seed=7), plan(problem, evaluations=500, seed=7)
    assert first.groups == again.groups
    assert first.gained == again.gained


def test_a_search_that_ran_out_of_time_is_repeated_by_its_number_of_evaluations(cases: dict[str, Case]) -> None:
    problem = _problem(cases["early13b_m8_g8_r40"])
    looks = iter(range(1000))
    timed = plan(problem, evaluations=100_000, seed=2, out_of_time=lambda: next(looks) > 120)
    assert timed.evaluations < 20_000
    again = plan(problem, evaluations=timed.evaluations, seed=2)
    assert (again.groups, again.evaluations) == (timed.groups, timed.evaluations)


def test_placements_go_to_groups_and_back() -> None:
    problem = _small()
    placement = Placement(np.array([0, 0], dtype=np.int32), np.array([[0, 1, 0], [1, 1, 0]], dtype=np.bool_))
    groups = to_groups(problem, placement)
    assert groups == (Group(Layout(1, 1, 1), (0, 1)), Group(Layout(1, 1, 1), (1,)))
    assert to_groups(problem, from_groups(problem, groups)) == groups


def test_a_model_that_fits_nowhere_is_named() -> None:
    work = _small().work
    with pytest.raises(InvalidInput, match=r"models\[2\] \(long\) fits no layout of 2 GPUs with 1\.5 GiB each"):
        Problem.of(work, PROFILES, num_devices=2, devices_per_node=2, memory_gib=1.5)


def _drifting() -> Problem:
    """Two models that no group of this memory holds together take turns, a minute each, beyond one GPU's rate."""
    random = np.random.default_rng(1)
    parts = [np.sort(random.uniform(60 * k, 60 * k + 60, 900)) for k in range(6)]
    work = Work(
        model_types=("short", "short"),
        slo_s=np.array([0.5, 0.5]),
        arrival_s=np.concatenate(parts),
        model=np.concatenate([np.where(random.random(900) < 0.02, 1 - k // 3, k // 3) for k in range(6)]).astype(
            np.int32
        ),
    )
    profiles = {("short", Layout(1, 1, 1)): StageProfile(latency_s=(0.1,), weight_gib=(2.0,))}
    return Problem.of(work, profiles, num_devices=2, devices_per_node=2, memory_gib=2.0)


def test_planning_again_beats_staying_although_moves_cost_time() -> None:
    found = replan(_drifting(), every_s=60.0, evaluations=200)
    assert found.num_moves >= 1
    assert found.moved_gib >= 2.0
    assert found.goodput > max(found.static_goodput, found.alpaserve_goodput) + 0.1


def test_without_drift_nothing_moves_once_the_first_plan_holds() -> None:
    problem = _small(rate=2.0)
    found = replan(problem, every_s=20.0, evaluations=200)
    assert found.num_moves == 0
    assert found.goodput == found.static_goodput


def test_the_command_prints_placements_in_the_format_of_the_cases(tmp_path: Path) -> None:
    document = json.loads(CASES_PATH.read_text())
    source = next(case for case in document["cases"] if case["case"] == "early13b_m8_g8_r20")
    for key in ("arrivals_test", "arrivals_train", "policies"):
        del source[key]
    source["arrivals_recipe"] = {"kind": "gamma", "duration": 60, "cv": 4}
    path = tmp_path / "cases.json"
    path.write_text(json.dumps({"cases": [source]}))
    options = ["--profiles", str(CASES_PATH.parent / "profiling_database.csv"), "--budget", "200", "--json"]
    result = CliRunner().invoke(app, ["plan-alpaserve", "--cases", str(path), "--replan-every", "30", *options])
    assert result.exit_code == 0, result.output
    row = json.loads(result.stdout)["cases"]["early13b_m8_g8_r20"]
    assert row["feasible"] is True
    (case,) = load_cases(path, database=CASES_PATH.parent / "profiling_database.csv")
    groups = [
        Group(Layout(group["dp"], group["op"], group["pp"]), tuple(group["models"]))
        for group in row["placement"]["groups"]
    ]
    assert goodput(case.test_work(), simulate(case.test_work(), groups, case.profiles)) == row["goodput"]
    assert row["goodput"] <= row["bound"]
    assert len(row["replanned"]["placement"]["placements"]) == row["replanned"]["num_moves"] + 1
