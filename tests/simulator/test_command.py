"""``loraplex simulate``: figures of both simulators from files; one line for what is wrong with them."""

import json
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loraplex.cli.main import app
from loraplex.core.ids import BaseModelId
from loraplex.core.plan import AdapterShare, BasePlacement, GroupPlan, Plan, Shape
from loraplex.simulator.scenarios import make_arrivals
from typer.testing import CliRunner, Result

FLEET = """
profiles: [h100-80gb]
nodes: [{name: n, gpu: h100-80gb, gpus: 2}]
adapters: {ranks: {"t0/a0": 8, "t1/a1": 16, "t0/a2": 64}}
"""


def _write_trace(path: Path, rows: int = 60, **changes: list[object]) -> None:
    arrivals = make_arrivals(num_requests=rows, rate=10, num_adapters=3, num_tenants=2)
    columns: dict[str, list[object]] = {
        "arrival_s": arrivals.arrival_s.tolist(),
        "tenant": [arrivals.tenants[index] for index in arrivals.tenant],
        "base_model_id": ["llama3-8b"] * rows,
        "adapter_name": [arrivals.adapters[index].name for index in arrivals.adapter],
        "prompt_tokens": arrivals.prompt_tokens.tolist(),
        "output_tokens": arrivals.output_tokens.tolist(),
        **changes,
    }
    pq.write_table(pa.table(columns), path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    _write_trace(tmp_path / "trace.parquet")
    (tmp_path / "fleet.yaml").write_text(FLEET)
    placed = BasePlacement(
        base_model_id=BaseModelId("llama3-8b"), adapters=(AdapterShare(tenant="t0", name="a0", weight=2.0),)
    )
    groups = tuple(GroupPlan(name=f"g{i}", shape=Shape(), gpu="h100-80gb", bases=(placed,)) for i in range(2))
    (tmp_path / "plan.yaml").write_bytes(msgspec.yaml.encode(Plan(version=1, groups=groups)))
    return tmp_path


def _run(folder: Path, *options: str) -> Result:
    files = [f"--{name}={folder / f'{name}.{ending}'}" for name, ending in _FILES.items()]
    return CliRunner().invoke(app, ["simulate", *files, *options])


_FILES = {"plan": "yaml", "trace": "parquet", "fleet": "yaml"}


@pytest.mark.parametrize("options", [(), ("--exact",)])
def test_figures_of_a_plan(folder: Path, options: tuple[str, ...]) -> None:
    result = _run(folder, "--slo", "ttft=200ms,tpot=20ms", "--json", *options)
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures["score"]["attainment"] == 1.0
    assert figures["outcomes"] == {"served": 60, "refused": 0, "impossible": 0}
    assert sum(group["num_requests"] for group in figures["groups"]) == 60
    assert sum(score["num_requests"] for score in figures["tenants"].values()) == 60
    assert set(figures["adapters"]) == {"t0/a0", "t1/a1", "t0/a2"}
    # A step reads 15 GB of weights at 3 TB/s.
    assert 0.005 < figures["score"]["tpot_s"]["p50"] < 0.02
    none = json.loads(_run(folder, "--slo", "ttft=1ms", "--json", *options).stdout)
    assert none["score"]["attainment"] == 0.0


def test_tables_for_people(folder: Path) -> None:
    result = _run(folder, "--window", "0:3")
    assert result.exit_code == 0, result.output
    assert "GPUs in steps" in result.output
    assert "t0/a0" in result.output


def _expect_line(result: Result, text: str) -> None:
    assert result.exit_code in (1, 2), result.output
    lines = [line for line in result.output.splitlines() if line]
    assert len(lines) == 1, result.output
    assert text in lines[0], result.output


def test_a_wrong_row_is_told_in_one_line(folder: Path) -> None:
    _write_trace(folder / "trace.parquet", output_tokens=[5] * 10 + [None] + [5] * 49)
    _expect_line(_run(folder), "trace row 10: output_tokens is below 1 or not given")
    _write_trace(folder / "trace.parquet", arrival_s=[float(i) for i in range(58)] + [3.0, 60.0])
    _expect_line(_run(folder), "row 58")


def test_an_unknown_adapter_is_told_in_one_line(folder: Path) -> None:
    (folder / "fleet.yaml").write_text(FLEET.replace('"t0/a2": 64', '"t0/a3": 64'))
    _expect_line(_run(folder), "unknown adapter t0/a2")


def test_a_plan_for_gpus_that_are_not_there_is_told_in_one_line(folder: Path) -> None:
    (folder / "fleet.yaml").write_text(FLEET.replace("gpus: 2", "gpus: 1"))
    _expect_line(_run(folder), "the groups need 2 GPUs of type h100-80gb, the fleet has 1")


def test_a_plan_that_is_none_is_told_in_one_line(folder: Path) -> None:
    (folder / "plan.yaml").write_text("groups: 3")
    _expect_line(_run(folder), "plan.yaml: not a plan")
