"""What a fleet is planned and measured on: experiments, traffic, placements, in one prepared file."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loraplex.bench.fleet.costs import fleet_costs, fleet_profile, problem_of
from loraplex.bench.fleet.options import read_experiment
from loraplex.bench.fleet.prepare import prepare
from loraplex.bench.fleet.prepared import PreparedFleet
from loraplex.bench.fleet.traffic import make_traffic
from loraplex.core.errors import BadConfig
from loraplex.core.plan import Plan
from loraplex.cost.memory import shared_pages

from tests.bench.fleet_experiments import FIELDS, RECIPE, synthetic, tiny_experiment


def test_plans_of_planner_and_baselines_that_are_one_are_measured_once(profile: Path, tmp_path: Path) -> None:
    names = ["planner", "selective replication", "1x1 apart", "best 2 baselines"]
    experiment = tiny_experiment(profile, tmp_path, loads={"mixed": synthetic()}, placements=names, evaluations=4)
    prepared = prepare(experiment, say=lambda line: None)
    placed = [name for cell in prepared.cells for name in cell.placements]
    assert {*names[:3]} < {*placed}
    assert len(placed) == len(set(placed)) == 5
    assert len({cell.plan for cell in prepared.cells}) == len(prepared.cells) < 5
    # As many pages as the simulator gives them: the memory of a device, divided among the bases that share it.
    costs = fleet_costs(experiment, fleet_profile(experiment))
    for cell in prepared.cells:
        for group, pages in zip(cell.plan.groups, cell.pages, strict=True):
            memory = next(cost.memory for key, cost in costs.items() if key.shape == group.shape)
            assert tuple(pages) == shared_pages([memory] * len(pages), [1.0] * len(pages))


def test_as_few_devices_as_suffice_and_one_less(profile: Path, tmp_path: Path) -> None:
    def names(rate: float) -> dict[str, int]:
        loads = {"plain": synthetic(plain=True, recipe={**RECIPE, "rate": rate})}
        one = tiny_experiment(
            profile,
            tmp_path,
            bases=FIELDS["bases"][:1],
            targets={"left": {"ttft_s": 0.05, "tpot_s": 0.05}},
            loads=loads,
            placements=["fewest for 90%"],
            evaluations=4,
        )
        prepared = prepare(one, say=lambda line: None)
        return {
            name: sum(group.shape.num_ranks for group in cell.plan.groups)
            for cell in prepared.cells
            for name in cell.placements
        }

    assert names(10) == {"planner on 1 of 2": 1}
    assert names(2000) == {"planner on 1 of 2": 1, "planner on 2 of 2": 2}


def test_it_is_planned_for_the_turns_that_are_measured(profile: Path, tmp_path: Path) -> None:
    experiment = tiny_experiment(profile, tmp_path, loads={"mixed": synthetic()}, turn_s=0.003)
    costs = fleet_costs(experiment, fleet_profile(experiment))
    problem = problem_of(experiment, make_traffic(experiment, experiment.loads["mixed"]), costs, {})
    plan = Plan(version=1, groups=())
    assert problem.simulation(plan).turn_s == problem.changed().simulation(plan).turn_s == 0.003


def test_one_timeline_is_planned_on_and_then_measured(profile: Path, tmp_path: Path) -> None:
    crowd = {"at_s": 5.5, "duration_s": 1, "factor": 8, "first": 0, "count": 1}
    experiment = tiny_experiment(
        profile, tmp_path, loads={"crowd": synthetic(recipe={**RECIPE, "flash_crowds": [crowd]})}
    )
    traffic = make_traffic(experiment, experiment.loads["crowd"])
    calm = make_traffic(experiment, tiny_experiment(profile, tmp_path, loads={"calm": synthetic()}).loads["calm"])
    assert (traffic.planning.arrival_s.max(), traffic.measured.arrival_s.max()) < (5.0, 2.0)
    assert np.array_equal(traffic.planning.prompt_tokens, calm.planning.prompt_tokens)
    assert len(traffic.measured) > len(calm.measured)
    # Ranks by the names of a base's adapters, in turn.
    ranks = {name.name: size.lora_rank for name, size in zip(traffic.planning.adapters, traffic.sizes, strict=True)}
    own = sorted(name.name for name in traffic.planning.adapters if name.base_model == "left")
    assert [ranks[name] for name in own] == [8, 16, 32, 64][: len(own)]

    loaded = prepare(
        tiny_experiment(profile, tmp_path, loads={"half": synthetic(load=0.05)}, placements=["1x1 apart"]), say=print
    )
    assert "5% of the full rate" in loaded.workloads["half"].load


def test_a_recorded_trace_without_bases_is_for_the_only_one(profile: Path, tmp_path: Path) -> None:
    rows = 40
    table = pa.table(
        {
            "arrival_s": [0.17 * row for row in range(rows)],
            "adapter_name": [f"a{row % 3}" if row % 4 else None for row in range(rows)],
            "prompt_tokens": [8] * rows,
            "output_tokens": [2] * rows,
        }
    )
    pq.write_table(table, tmp_path / "trace.parquet")
    loads = {"recorded": {"kind": "trace", "path": str(tmp_path / "trace.parquet")}}
    one = tiny_experiment(profile, tmp_path, loads=loads, bases=FIELDS["bases"][:1], targets={}, placements=["2x1"])
    prepared = prepare(one, say=lambda line: None)
    assert [name[:3] for name in prepared.workloads["recorded"].adapters] == [
        ("nobody", "left", f"a{index}") for index in (1, 2, 0)
    ]
    assert prepared.targets["left"].ttft_s > 0
    with pytest.raises(BadConfig, match="a request has no base"):
        prepare(tiny_experiment(profile, tmp_path, loads=loads), say=print)


def test_wrong_experiments_are_one_clear_line(profile: Path, tmp_path: Path) -> None:
    def refused(match: str, **fields: Any) -> None:
        with pytest.raises(BadConfig, match=match):
            prepare(tiny_experiment(profile, tmp_path, **{"loads": {"mixed": synthetic()}, **fields}), say=print)

    refused("experiment.json: Object contains unknown field `gpuz`", gpuz=2)
    refused("bases: a name comes twice", bases=[FIELDS["bases"][0]] * 2)
    refused("device 'tpu': cpu or cuda", device="tpu")
    refused("the fleet has no base 'middle'", targets={"middle": {"ttft_s": 1, "tpot_s": 1}})
    refused(
        "is not of the size that the profiles have", bases=[{"name": "tiny", "model": "random:llama3-1b"}], targets={}
    )
    refused("has no GPU 'h100'", gpu="h100")
    refused("recipe: Object contains unknown field `ratio`", loads={"mixed": synthetic(recipe={**RECIPE, "ratio": 1})})
    refused("placement 'best plan'", placements=["best plan"])
    refused("no plan for 2 devices attains 1.01 .*1.000 by planner on 2 of 2", placements=["fewest for 101%"])
    refused("'4x1' needs more than 2 devices", placements=["4x1"])
    refused("'2x1 apart' needs more than 2 devices", placements=["2x1 apart"])
    refused("plan.yaml: not a plan", placements=[str(tmp_path / "plan.yaml")])
    pools = {"left": "m-mid"}
    functions = {"kind": "functions", "load": 0.5, "cv": 4, "adapters": {"left": 4, "right": 2}, "pools": pools}
    refused("loads.maf: adapters and pools name different bases", loads={"maf": functions})
    with pytest.raises(BadConfig, match="not an experiment"):
        read_experiment(tmp_path / "nosuch.json")
    with pytest.raises(BadConfig, match="not a prepared experiment"):
        PreparedFleet.load(tmp_path / "experiment.json")


def test_a_plan_from_a_file_keeps_its_adapter_sets(profile: Path, tmp_path: Path) -> None:
    group = {"shape": {"tp": 1, "pp": 1}, "bases": [{"base_model_id": "left"}]}
    sets = [[{"tenant": "tenant-0", "name": f"adapter-{index}"}] for index in (0, 1)]
    groups = [
        {**group, "name": f"x{index}", "bases": [{"base_model_id": "left", "adapters": listed}]}
        for index, listed in enumerate(sets)
    ]
    (tmp_path / "plan.json").write_text(json.dumps({"version": 3, "groups": groups}))
    experiment = tiny_experiment(
        profile,
        tmp_path,
        bases=FIELDS["bases"][:1],
        targets={},
        loads={"mixed": synthetic()},
        placements=[str(tmp_path / "plan.json")],
    )
    (cell,) = prepare(experiment, say=lambda line: None).cells
    names = [[share.name for share in group.bases[0].adapters] for group in cell.plan.groups]
    assert names == [["adapter-0"], ["adapter-1"]]
    assert {replace(group, name="", bases=()) for group in cell.plan.groups} == {
        replace(cell.plan.groups[0], name="", bases=())
    }
