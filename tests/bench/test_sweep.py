import json
import xml.etree.ElementTree
from pathlib import Path

import pytest
from loraplex.bench.cases import CASES, SINGLE_TTFT, chosen_cases
from loraplex.bench.options import EngineSetup
from loraplex.bench.plot import bar_chart
from loraplex.bench.results import SweepTable
from loraplex.bench.sweep import SweepOptions, run_sweep
from loraplex.core.errors import BadConfig

SETUP = EngineSetup(model="random:tiny-llama", threads=1, num_pages=2000)


def _sweep(out: Path, *cases: str, rounds: int = 1, budget_s: float | None = None) -> tuple[SweepTable, list[str]]:
    said: list[str] = []
    options = SweepOptions(setup=SETUP, cases=cases, rounds=rounds, budget_s=budget_s, shrink=64)
    return run_sweep(options, out, say=said.append), said


def test_a_sweep_goes_on_where_its_file_ends(tmp_path: Path) -> None:
    out = tmp_path / "results" / "sweep.json"
    first, said = _sweep(out, "lora-256", "base")
    assert len(said) == 2
    assert [row.case for row in first.rows] == ["lora-256", "base"]
    second, said = _sweep(out, "lora-256", "base", SINGLE_TTFT, rounds=2)
    assert [line.split(":")[0] for line in said] == [SINGLE_TTFT, "lora-256", "base"]
    assert second.rows[:2] == first.rows
    assert second.single_ttft is not None
    assert _sweep(out, "lora-256", "base", SINGLE_TTFT, rounds=2)[1] == []

    table = json.loads(out.read_text())
    row = table["rows"][0]
    figures = ("adapters", "requests", "input_tokens", "output_tokens", "lora_rank")
    assert [row[name] for name in figures] == [4, 4, 4, 2, 16]
    assert row["output_tokens_per_s"] > 0
    assert row["ttft_ms"] > 0
    assert row["tpot_ms"] > 0
    assert 0 < row["eta"] < 1
    assert [summary["rounds"] for summary in table["summary"]] == [2, 2]
    assert table["summary"][0]["ratio"] == 1
    rates = [
        [row["output_tokens_per_s"] for row in table["rows"] if row["case"] == case] for case in ("lora-256", "base")
    ]
    ratios = [base / lora for lora, base in zip(*rates, strict=True)]
    assert table["summary"][1]["ratio"] == pytest.approx(sum(ratios) / 2)
    plot = xml.etree.ElementTree.parse(out.with_suffix(".svg"))
    assert len(plot.findall("{http://www.w3.org/2000/svg}rect")) == 3


def test_a_budget_leaves_cases_and_says_which(tmp_path: Path) -> None:
    out = tmp_path / "sweep.json"
    table, said = _sweep(out, "base", "lora-1", budget_s=0.0)
    assert not said
    assert table.left == ["base (round 1)", "lora-1 (round 1)"]
    assert json.loads(out.read_text())["left"] == table.left
    assert _sweep(out, "base")[0].left == []


def test_other_set_ups_do_not_mix(tmp_path: Path) -> None:
    out = tmp_path / "sweep.json"
    _sweep(out, "base", budget_s=0.0)
    with pytest.raises(BadConfig, match="another set-up"):
        run_sweep(SweepOptions(setup=EngineSetup(model="random:tiny-qwen3")), out, say=print)
    out.write_text("{}")
    with pytest.raises(BadConfig, match="not the table"):
        _sweep(out, "base")
    with pytest.raises(BadConfig, match="'nosuch'"):
        _sweep(tmp_path / "other.json", "nosuch")


def test_cases() -> None:
    everything = chosen_cases((), 1)
    assert list(everything) == [*CASES, SINGLE_TTFT]
    many = everything["many-2000-capped"]
    assert many is not None
    assert (many.requests, many.adapters, many.lora_ranks, many.concurrency) == (4000, 2000, (8,), 256)
    for load in everything.values():
        if load is not None:
            load.check()


def test_plot_escapes() -> None:
    root = xml.etree.ElementTree.fromstring(bar_chart("<a>", "tok & s", [("b<c", 2.0, "n"), ("none", 0.0, "")]))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[:2] == ["<a>", "tok & s"]
    assert "b<c" in texts
