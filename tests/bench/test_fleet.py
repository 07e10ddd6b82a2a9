"""A plan's replicas as processes of this machine, the router before them, and the simulator's word beside."""

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
import pytest
from loraplex.bench.fleet import measure as fleet_measure
from loraplex.bench.fleet.measure import MeasureOptions, measure, row_lines
from loraplex.bench.fleet.page import fleet_page
from loraplex.bench.fleet.prepare import prepare
from loraplex.bench.fleet.prepared import PreparedFleet
from loraplex.bench.fleet.ranking import ranked, ranking_lines
from loraplex.bench.fleet.replicas import FleetReplicas
from loraplex.bench.fleet.results import ALL, Figure, FleetRow, FleetTable
from loraplex.core.errors import BadConfig, LoraplexError
from loraplex.core.plan import Shape
from loraplex.cost.samples import Samples

from tests.bench.fleet_experiments import synthetic, tiny_experiment


@pytest.fixture(scope="module")
def measured(profile: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreparedFleet, Path, list[str]]:
    """Two loads on one base each, one on both bases in turns on a group of two ranks."""
    folder = tmp_path_factory.mktemp("measured")
    loads = {"mixed": synthetic(), "plain": synthetic(plain=True)}
    said: list[str] = []
    prepared = prepare(tiny_experiment(profile, folder, loads=loads), say=said.append)
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
        assert sum(total.time_s.predicted for total in totals.values()) == pytest.approx(predicted.sum())
        assert sum(total.time_s.measured for total in totals.values()) == pytest.approx(seconds.sum())
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


def test_a_measuring_machine_needs_few_packages() -> None:
    program = (
        "import sys\n"
        "names = ('opentelemetry', 'scipy', 'sqlalchemy', 'typer', 'httpx', 'fastapi', 'starlette', 'ray')\n"
        "sys.modules.update(dict.fromkeys(names))\n"
        "import loraplex.bench.fleet.__main__, loraplex.bench.fleet.replica"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
