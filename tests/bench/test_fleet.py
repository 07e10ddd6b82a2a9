"""A plan's replicas as processes of this machine, the router before them, and the simulator's word beside."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loraplex.bench.fleet import measure as fleet_measure
from loraplex.bench.fleet.costs import fleet_costs, fleet_profile
from loraplex.bench.fleet.measure import MeasureOptions, measure, row_lines
from loraplex.bench.fleet.options import Experiment, read_experiment
from loraplex.bench.fleet.page import fleet_page
from loraplex.bench.fleet.prepare import prepare
from loraplex.bench.fleet.prepared import PreparedFleet
from loraplex.bench.fleet.ranking import ranked, ranking_lines
from loraplex.bench.fleet.replicas import FleetReplicas
from loraplex.bench.fleet.results import ALL, Figure, FleetRow, FleetTable
from loraplex.bench.fleet.traffic import make_traffic
from loraplex.core.errors import BadConfig, LoraplexError
from loraplex.core.ids import BaseModelId
from loraplex.core.plan import Shape
from loraplex.cost.analytic import analytic_profile
from loraplex.cost.ceilings import Ceilings
from loraplex.cost.memory import shared_pages
from loraplex.cost.samples import Samples
from loraplex.model_runner.build import load_model_spec

FIELDS: dict[str, Any] = {
    "gpus": 2,
    "gpu": "cpu",
    "device": "cpu",
    "threads": 1,
    "bases": [
        {"name": "left", "model": "random:tiny-llama", "profile": "tiny"},
        {"name": "right", "model": "random:tiny-llama", "profile": "tiny"},
    ],
    "engine": {"max_running": 8, "max_step_tokens": 64},
    "targets": {base: {"ttft_s": 5.0, "tpot_s": 5.0} for base in ("left", "right")},
    "loads": {},
    "placements": ["1x1 apart", "2x1"],
    "planning_s": 5,
    "warm_s": 0.5,
    "seconds": 1.5,
}
RECIPE = {
    "adapters": 6,
    "rate": 10,
    "cv": 2,
    "skew": 1,
    "lengths": "lognormal:24,0.5,6,0.5",
    "max_prompt_tokens": 60,
    "max_output_tokens": 12,
}


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ceilings = Ceilings(
        name="cpu",
        source="assumed",
        measured=False,
        copy_bytes_per_s=5e9,
        gemm_flops_per_s=((1, 5e9), (64, 2e10)),
        host_bytes_per_s=2e9,
        memory_bytes=32 << 20,
        link_bytes_per_s=1e9,
        collective_s=2e-4,
    )
    model = load_model_spec("random:tiny-llama", BaseModelId("tiny"))
    path = tmp_path_factory.mktemp("fleet") / "cpu.json"
    path.write_bytes(analytic_profile([model], ceilings, [Shape(), Shape(tp=2), Shape(pp=2)], itemsize=4).to_json())
    return path


def _file(profile: Path, folder: Path, **fields: Any) -> Path:
    path = folder / "experiment.json"
    path.write_text(json.dumps({**FIELDS, "profiles": [str(profile)], **fields}))
    return path


def _experiment(profile: Path, folder: Path, **fields: Any) -> Experiment:
    return read_experiment(_file(profile, folder, **fields))


def _load(**fields: Any) -> dict[str, Any]:
    return {"kind": "synthetic", "recipe": RECIPE, **fields}


@pytest.fixture(scope="module")
def measured(profile: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreparedFleet, Path, list[str]]:
    """Two loads on one base each, one on both bases in turns on a group of two ranks."""
    folder = tmp_path_factory.mktemp("measured")
    loads = {"mixed": _load(), "plain": _load(plain=True)}
    said: list[str] = []
    prepared = prepare(_experiment(profile, folder, loads=loads), say=said.append)
    prepared.write(folder / "prepared.json")
    again = PreparedFleet.load(folder / "prepared.json")
    assert again.digest == prepared.digest
    out = folder / "results" / "fleet.json"
    measure(again, out, MeasureOptions(largest_wave=2, placements=("1x1 apart",)), say=said.append)
    assert len(FleetTable.load(out).rows) == 2
    options = MeasureOptions(largest_wave=2, workloads=("mixed",), steps_to=str(folder / "steps"))
    measure(again, out, options, say=said.append)
    return prepared, out, said


def test_every_request_is_measured_beside_its_prediction(measured: tuple[PreparedFleet, Path, list[str]]) -> None:
    prepared, out, said = measured
    table = FleetTable.load(out)
    assert [(row.workload, row.placements) for row in table.rows] == [
        ("mixed", ("1x1 apart",)),
        ("plain", ("1x1 apart",)),
        ("mixed", ("2x1",)),
    ]
    for row in table.rows:
        workload = prepared.workloads[row.workload]
        counted = [at_s >= workload.counts_from_s for at_s in workload.arrival_s]
        assert row.requests == sum(counted) == len(row.ttft_s) > 3
        assert row.unanswered == 0
        assert all(value is not None and value > 0 for value in row.ttft_s)
        assert row.figures[ALL]["attainment"].measured == row.figures[ALL]["attainment"].predicted == 1.0
        mean = row.figures[ALL]["ttft_mean_s"]
        assert mean.measured == pytest.approx(np.mean([value or 0 for value in row.ttft_s]), rel=1e-4)
        assert mean.predicted is not None
        assert mean.predicted > min(row.overhead_s.values())
        assert {*row.figures} == {"left", "right", ALL}
        assert row.lateness.p50_ms < 100
        assert row.device_name == "2 x cpu"
    # One layout serves both of its workloads, and is started once.
    assert sum(line.endswith("starting") for line in said) == 2
    assert table.rows[2].groups == "left+right tp2 pp1"


def test_steps_are_recorded_beside_what_the_profile_says(measured: tuple[PreparedFleet, Path, list[str]]) -> None:
    prepared, out, said = measured
    *apart, both = FleetTable.load(out).rows
    assert not any(row.steps for row in apart)
    workload = prepared.workloads["mixed"]
    taken = msgspec.json.decode((out.parent.parent / "steps" / "mixed-2x1.json").read_bytes(), type=dict[str, Samples])
    assert len(taken) == 2
    for name, samples in taken.items():
        base = name.rpartition("/")[2]
        steps, seconds = samples.arrays()
        own = np.array(workload.base) == workload.bases.index(base)
        # Of the load alone, not of the warm-up: every prompt, and no token more than asked for.
        assert steps.prefill_tokens.sum() + steps.decode_rows.sum() == pytest.approx(
            (workload.arrivals.prompt_tokens + workload.arrivals.output_tokens - 1)[own].sum()
        )
        assert (seconds > 0).all()
        predicted = prepared.profile.step_cost(base, "cpu", Shape(tp=2)).interval_s(steps)
        totals = both.steps[base]
        assert sum(total.steps for total in totals.values()) == len(steps)
        assert sum(total.predicted_s for total in totals.values()) == pytest.approx(predicted.sum())
        assert sum(total.measured_s for total in totals.values()) == pytest.approx(seconds.sum())
        assert totals["with prompts"].steps == np.count_nonzero(steps.prefill_rows)
        assert any(line.startswith(f"  steps of {base}: {totals['decode'].steps} decode in ") for line in said)


def test_plans_are_ranked_by_the_requests_that_they_share(measured: tuple[PreparedFleet, Path, list[str]]) -> None:
    _, out, _ = measured
    row = FleetTable.load(out).rows[0]
    assert row.good == "1" * row.requests

    def of(name: str, good: str) -> FleetRow:
        return msgspec.structs.replace(row, placements=(name,), good=good)

    # The same requests fail under both, and one in ten more under the second.
    worse = of("worse", "0000011111" * 20)
    best, second = ranked([worse, of("better", "0000111111" * 20)])
    assert (best.row.placements, best.behind, best.interval) == (("better",), 0.0, (0.0, 0.0))
    assert second.behind == pytest.approx(0.1)
    low, high = second.interval
    assert 0.05 < low < 0.1 < high < 0.15
    # Unpaired the spread would be thrice as wide; here half of the requests change sides.
    _, mixed = ranked([worse, of("other", "1111100000" * 19 + "1111110000")])
    assert mixed.behind < 0.01
    assert mixed.interval[0] < -0.1
    lines = ranking_lines([worse, msgspec.structs.replace(row, workload="other")])
    assert [line for line in lines if line.endswith(":")] == [f"{worse.workload}:", "other:"]
    assert "worse (left tp1 pp1, right tp1 pp1): 0.500, 0.0 points behind (0.0 to 0.0); predicted 1.000" in lines[1]


def test_the_page_ranks_plans_and_marks_predictions(measured: tuple[PreparedFleet, Path, list[str]]) -> None:
    _, out, _ = measured
    results = FleetTable.load(out)
    row = results.rows[0]

    def of(name: str, good: str, *, p50: float, load: str = row.workload) -> FleetRow:
        figures = row.figures[ALL] | {
            "attainment": Figure(measured=good.count("1") / 10, predicted=1.0, difference=1 - good.count("1") / 10),
            "ttft_p50_s": Figure(measured=0.1, predicted=0.1 * (1 + p50), difference=p50),
        }
        return msgspec.structs.replace(
            row, workload=load, placements=(name,), good=good, figures=row.figures | {ALL: figures}, errors={"gone": 3}
        )

    rows = [of("2x1", "1" * 8 + "00", p50=0.04), of("planner", "1" * 10, p50=-0.2)]
    text = fleet_page(msgspec.structs.replace(results, rows=rows, left=["mixed: 1x2"]))
    assert text.replace("\N{NO-BREAK SPACE}", " ").index("100.0 / 100.0 (+0.0) ✓") < text.index("80.0")
    words = text.replace("\N{NO-BREAK SPACE}", " ")
    assert "80.0 / 100.0 (+20.0) ✗" in words
    assert "100 / 104 (+4.0 %) ✓" in words
    assert "100 / 80 (-20.0 %) ✗" in words
    assert "<b>1 of 1</b><span>loads in which the planner" in words
    assert "<b>1 of 2</b><span>TTFT p50 within 5 %" in words
    assert "2x1: 3 x gone" in words
    assert "mixed: 1x2" in words
    assert "fleet measure" in words
    assert "http" not in words.replace("http://www.w3.org/2000/svg", "")
    assert "<summary>Charts" not in words
    many = [of("planner", "1" * 10, p50=0.0, load=f"load-{index}") for index in range(5)]
    assert fleet_page(msgspec.structs.replace(results, rows=many)).count("<summary>Charts") == 5


def test_what_is_there_is_not_run_again(measured: tuple[PreparedFleet, Path, list[str]], tmp_path: Path) -> None:
    prepared, out, _ = measured
    before, said = out.read_bytes(), []
    table = measure(prepared, out, MeasureOptions(placements=("1x1 apart",)), say=said.append)
    assert not said
    assert len(table.rows) == 3
    left = measure(prepared, out, MeasureOptions(budget_s=0.0), say=said.append)
    assert (left.left, said) == (["plain: 2x1"], [])
    measure(prepared, out, MeasureOptions(placements=("1x1 apart",)), say=said.append)
    assert out.read_bytes() == before
    assert len(row_lines(table.rows[0])) == 4

    other = msgspec.structs.replace(prepared, targets={})
    with pytest.raises(BadConfig, match="another prepared experiment"):
        measure(other, out, MeasureOptions(), say=print)
    out_of_place = tmp_path / "other.json"
    out_of_place.write_text("{}")
    with pytest.raises(BadConfig, match="not the results"):
        measure(prepared, out_of_place, MeasureOptions(), say=print)
    with pytest.raises(BadConfig, match="File exists"):
        measure(prepared, tmp_path / "new.json", MeasureOptions(steps_to=str(out_of_place)), say=print)
    for options in (MeasureOptions(workloads=("nosuch",)), MeasureOptions(placements=("nosuch",))):
        with pytest.raises(BadConfig, match="'nosuch' is not prepared"):
            measure(prepared, tmp_path / "new.json", options, say=print)


def test_a_cell_starts_only_where_one_like_those_before_it_would_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr(fleet_measure, "time", SimpleNamespace(monotonic=lambda: now_s))
    budget = fleet_measure._Budget(300.0)
    cell: Any = SimpleNamespace(arrival_s=[1.0, 40.0])
    assert budget.holds(cell, fresh=True)
    # 30 s to start, 20 s to warm up.
    now_s = 90.0
    budget.took(60.0, cell, start_s=30.0)
    for at_s, fresh, holds in ((210.0, True, True), (211.0, True, False), (240.0, False, True), (241.0, False, False)):
        now_s = at_s
        assert budget.holds(cell, fresh=fresh) == holds
    budget.took(45.0, cell, start_s=None)
    now_s = 255.0
    assert budget.holds(cell, fresh=False)
    assert not budget.holds(cell, fresh=True)
    assert fleet_measure._Budget(None).holds(cell, fresh=True)


def test_a_replica_that_cannot_start_or_ends_is_noticed(measured: tuple[PreparedFleet, Path, list[str]]) -> None:
    prepared, *_ = measured
    apart = prepared.cells[0]
    alone = msgspec.structs.replace(apart, plan=replace(apart.plan, groups=apart.plan.groups[1:]), pages=[[0]])
    with pytest.raises(BadConfig, match="g1/right: the arena has no room"):
        FleetReplicas(prepared.experiment, alone)
    with FleetReplicas(prepared.experiment, msgspec.structs.replace(alone, pages=[[64]])) as replicas:
        replicas.check()
        os.kill(replicas.process_ids[0], signal.SIGKILL)
        with pytest.raises(LoraplexError, match="g1/right ended: exit code -9"):
            replicas.stage(alone, prepared.workloads[alone.workload])
        with pytest.raises(LoraplexError, match="g1/right ended: exit code -9"):
            replicas.check()


def test_plans_of_planner_and_baselines_that_are_one_are_measured_once(profile: Path, tmp_path: Path) -> None:
    names = ["planner", "selective replication", "1x1 apart", "best 2 baselines"]
    experiment = _experiment(profile, tmp_path, loads={"mixed": _load()}, placements=names, evaluations=4)
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
        loads = {"plain": _load(plain=True, recipe={**RECIPE, "rate": rate})}
        one = _experiment(
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


def test_one_timeline_is_planned_on_and_then_measured(profile: Path, tmp_path: Path) -> None:
    crowd = {"at_s": 5.5, "duration_s": 1, "factor": 8, "first": 0, "count": 1}
    experiment = _experiment(profile, tmp_path, loads={"crowd": _load(recipe={**RECIPE, "flash_crowds": [crowd]})})
    traffic = make_traffic(experiment, experiment.loads["crowd"])
    calm = make_traffic(experiment, _experiment(profile, tmp_path, loads={"calm": _load()}).loads["calm"])
    assert (traffic.planning.arrival_s.max(), traffic.measured.arrival_s.max()) < (5.0, 2.0)
    assert np.array_equal(traffic.planning.prompt_tokens, calm.planning.prompt_tokens)
    assert len(traffic.measured) > len(calm.measured)
    # Ranks by the names of a base's adapters, in turn.
    ranks = {name.name: size.lora_rank for name, size in zip(traffic.planning.adapters, traffic.sizes, strict=True)}
    own = sorted(name.name for name in traffic.planning.adapters if name.base_model == "left")
    assert [ranks[name] for name in own] == [8, 16, 32, 64][: len(own)]

    loaded = prepare(
        _experiment(profile, tmp_path, loads={"half": _load(load=0.05)}, placements=["1x1 apart"]), say=print
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
    one = _experiment(profile, tmp_path, loads=loads, bases=FIELDS["bases"][:1], targets={}, placements=["2x1"])
    prepared = prepare(one, say=lambda line: None)
    assert [name[:3] for name in prepared.workloads["recorded"].adapters] == [
        ("nobody", "left", f"a{index}") for index in (1, 2, 0)
    ]
    assert prepared.targets["left"].ttft_s > 0
    with pytest.raises(BadConfig, match="a request has no base"):
        prepare(_experiment(profile, tmp_path, loads=loads), say=print)


def test_wrong_experiments_are_one_clear_line(profile: Path, tmp_path: Path) -> None:
    def refused(match: str, **fields: Any) -> None:
        with pytest.raises(BadConfig, match=match):
            prepare(_experiment(profile, tmp_path, **{"loads": {"mixed": _load()}, **fields}), say=print)

    refused("experiment.json: Object contains unknown field `gpuz`", gpuz=2)
    refused("bases: a name comes twice", bases=[FIELDS["bases"][0]] * 2)
    refused("device 'tpu': cpu or cuda", device="tpu")
    refused("the fleet has no base 'middle'", targets={"middle": {"ttft_s": 1, "tpot_s": 1}})
    refused(
        "is not of the size that the profiles have", bases=[{"name": "tiny", "model": "random:llama3-1b"}], targets={}
    )
    refused("has no GPU 'h100'", gpu="h100")
    refused("recipe: Object contains unknown field `ratio`", loads={"mixed": _load(recipe={**RECIPE, "ratio": 1})})
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
    experiment = _experiment(
        profile,
        tmp_path,
        bases=FIELDS["bases"][:1],
        targets={},
        loads={"mixed": _load()},
        placements=[str(tmp_path / "plan.json")],
    )
    (cell,) = prepare(experiment, say=lambda line: None).cells
    names = [[share.name for share in group.bases[0].adapters] for group in cell.plan.groups]
    assert names == [["adapter-0"], ["adapter-1"]]
    assert {replace(group, name="", bases=()) for group in cell.plan.groups} == {
        replace(cell.plan.groups[0], name="", bases=())
    }


def test_a_measuring_machine_needs_few_packages() -> None:
    program = (
        "import sys\n"
        "names = ('opentelemetry', 'scipy', 'sqlalchemy', 'typer', 'httpx', 'fastapi', 'starlette', 'ray')\n"
        "sys.modules.update(dict.fromkeys(names))\n"
        "import loraplex.bench.fleet.__main__, loraplex.bench.fleet.replica"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
