"""What is wrong with a trace, a plan, a fleet or a target is one line that names the row, key, group or base."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import Result
from loraplex.cli.main import app
from typer.testing import CliRunner

FLEET = "profiles: [h100-80gb]\nnodes: [{name: n, gpu: h100-80gb, gpus: 2}]\nadapters: {lora_rank: 16}\n"
TWO_TYPES = "profiles: [h100-80gb]\nnodes: [{name: n, gpu: h100-80gb, gpus: 2}, {name: m, gpu: a100-80gb, gpus: 4}]\n"
GROUP = "{name: g0, shape: {tp: 1}, gpu: h100-80gb, bases: [{base_model_id: llama3-8b}]}"
ROWS = 12


def _write_trace(path: Path, **changes: list[Any]) -> None:
    columns: dict[str, list[Any]] = {
        "arrival_s": [row * 0.5 for row in range(ROWS)],
        "tenant": ["t0"] * ROWS,
        "base_model_id": ["llama3-8b"] * ROWS,
        "adapter_name": [f"a{row % 3}" for row in range(ROWS)],
        "prompt_tokens": [100] * ROWS,
        "output_tokens": [20] * ROWS,
    } | changes
    count = min(map(len, columns.values()))
    pq.write_table(pa.table({name: values[:count] for name, values in columns.items()}), path)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    _write_trace(tmp_path / "t.parquet")
    (tmp_path / "fleet.yaml").write_text(FLEET)
    (tmp_path / "plan.yaml").write_text(f"{{version: 1, groups: [{GROUP}]}}")
    return tmp_path


COMMANDS = {
    "plan": "plan --trace t.parquet --fleet fleet.yaml --budget 1 --no-compare",
    "whatif": "whatif --trace t.parquet --fleet fleet.yaml --vary rate --values 1 --budget 1 --no-compare",
    "simulate": "simulate --plan plan.yaml --trace t.parquet --fleet fleet.yaml",
    "current": "plan --trace t.parquet --fleet fleet.yaml --budget 1 --no-compare --current plan.yaml",
    "diff": "plan diff plan.yaml plan.yaml --fleet fleet.yaml",
}
WITH_TRACE = ("plan", "whatif", "simulate")
WITH_PLAN = ("current", "simulate", "diff")


def _expect(command: str, words: str) -> None:
    result: Result = CliRunner().invoke(app, command.split())
    assert result.exit_code in (1, 2), result.output
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert words in result.stderr
    # A line of ours, not the name of an exception that nobody expected.
    assert "Error:" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("command", WITH_TRACE)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arrival_s": []}, "trace t.parquet has no rows"),
        ({"arrival_s": [0.0, 2.0, 1.0] + [3.0] * 9}, "row 2 arrives at 1.0 s, after one at 2.0 s"),
        ({"arrival_s": [-1.0] + [1.0] * 11}, "row 0 has arrival time -1.0"),
        ({"arrival_s": [0.0, float("nan")] + [1.0] * 10}, "row 1 has arrival time nan"),
        ({"prompt_tokens": [10, None] + [10] * 10}, "trace row 1: prompt_tokens is below 1 or not given"),
        ({"output_tokens": [20, 20, 0] + [20] * 9}, "trace row 2: output_tokens is below 1 or not given"),
    ],
)
def test_a_wrong_trace(folder: Path, command: str, changes: dict[str, list[Any]], words: str) -> None:
    _write_trace(folder / "t.parquet", **changes)
    _expect(COMMANDS[command], words)


@pytest.mark.parametrize("command", ["plan", "whatif"])
def test_a_trace_that_does_not_say_its_base(folder: Path, command: str) -> None:
    _write_trace(folder / "t.parquet", base_model_id=[None] * ROWS)
    _expect(COMMANDS[command], "trace row 0: no base is given")


@pytest.mark.parametrize("command", WITH_TRACE)
def test_an_unknown_adapter(folder: Path, command: str) -> None:
    (folder / "fleet.yaml").write_text(FLEET.replace("lora_rank: 16", 'lora_rank: null, ranks: {"t0/a0": 8}'))
    _expect(COMMANDS[command], "unknown adapter t0/a1")


def test_an_unknown_adapter_of_a_plan(folder: Path) -> None:
    (folder / "fleet.yaml").write_text(FLEET.replace("lora_rank: 16", "lora_rank: null"))
    new = GROUP.replace("llama3-8b}", "llama3-8b, adapters: [{tenant: t0, name: a9}]}")
    (folder / "new.yaml").write_text(f"{{version: 2, groups: [{new}]}}")
    _expect("plan diff plan.yaml new.yaml --fleet fleet.yaml", "unknown adapter t0/a9")


@pytest.mark.parametrize("command", WITH_PLAN)
@pytest.mark.parametrize(
    ("group", "words"),
    [
        (GROUP.replace("h100-80gb", "a100"), "group g0: the fleet has no GPU of type a100"),
        (GROUP.replace("tp: 1", "tp: 4"), "the groups need 4 GPUs of type h100-80gb, the fleet has 2"),
        (GROUP.replace("gpu:", "nodes: [x], gpu:"), "group g0: the fleet has no node x"),
        (GROUP.replace("tp: 1}", "tp: 2}, nodes: [n]"), "group g0: 1 nodes for 2 ranks"),
        (GROUP.replace("tp: 1", "tp: 0"), "group g0: shape tp0 pp1 is none"),
        (f"{GROUP}, {GROUP}", "group g0: its name is empty or comes twice"),
        (GROUP.replace("8b}", "8b}, {base_model_id: llama3-8b}"), "group g0: base llama3-8b comes twice"),
        (GROUP.replace("8b}", "8b, arena_share: .nan}"), "group g0: base llama3-8b: arena share nan is not above 0"),
        (
            GROUP.replace("8b}", "8b, adapters: [{tenant: t0, name: a0, weight: .nan}]}"),
            "group g0: adapter a0: weight nan is not above 0",
        ),
        (GROUP.replace("llama3-8b", "llama9"), "the cost profile has no base 'llama9'"),
        (GROUP.replace("shape", "shap"), "plan.yaml: not a plan: Object missing required field `shape`"),
    ],
)
def test_a_wrong_plan(folder: Path, command: str, group: str, words: str) -> None:
    (folder / "plan.yaml").write_text(f"{{version: 1, groups: [{group}]}}")
    _expect(COMMANDS[command], words)


def test_the_type_of_gpu_is_needed_where_there_are_two(folder: Path) -> None:
    (folder / "plan.yaml").write_text(f"{{version: 1, groups: [{GROUP.replace('gpu: h100-80gb, ', '')}]}}")
    result = CliRunner().invoke(app, COMMANDS["diff"].split())
    assert result.exit_code == 0, result.output
    (folder / "fleet.yaml").write_text(TWO_TYPES)
    _expect(COMMANDS["diff"], "group g0: its type of GPU is not given, and the fleet has h100-80gb, a100-80gb")
    (folder / "plan.yaml").write_text(f"{{version: 1, groups: [{GROUP.replace('gpu:', 'nodes: [m], gpu:')}]}}")
    _expect(COMMANDS["diff"], "group g0: node m has GPUs of type a100-80gb, not h100-80gb")


def test_targets_that_no_layout_meets(folder: Path) -> None:
    words = "no layout of base llama3-8b meets ttft 0.5 s and tpot 1e-05 s"
    _expect(f"{COMMANDS['plan']} --slo ttft=500ms,tpot=0.01ms", words)
    _expect(f"{COMMANDS['whatif'].replace('rate', 'slo')} --slo ttft=500ms,tpot=0.01ms", f"slo 1: {words}")


@pytest.mark.parametrize("command", ["plan", "whatif"])
def test_a_base_that_fits_nowhere(folder: Path, command: str) -> None:
    _write_trace(folder / "t.parquet", base_model_id=["llama3-70b"] * ROWS)
    (folder / "fleet.yaml").write_text(FLEET.replace("gpus: 2", "gpus: 1"))
    _expect(COMMANDS[command], "base llama3-70b fits nowhere: no shape on 1 GPUs (h100-80gb)")


def test_a_group_whose_base_does_not_fit(folder: Path) -> None:
    _write_trace(folder / "t.parquet", base_model_id=["llama3-70b"] * ROWS)
    (folder / "plan.yaml").write_text(f"{{version: 1, groups: [{GROUP.replace('8b', '70b')}]}}")
    for command in ("simulate", "current"):
        _expect(COMMANDS[command], "group g0: llama3-70b does not fit")


@pytest.mark.parametrize(
    ("command", "options", "words"),
    [
        ("plan", "--report r.pdf", "--report r.pdf: its ending is not .html or .json"),
        ("plan", "--out nosuch/plan.yaml", "--out nosuch/plan.yaml: no directory"),
        ("plan", "--score-window 5:x", "window '5:x' is not START:END in seconds"),
        ("plan", "--window nan:2", "window nan:2.0 is empty or starts before 0"),
        ("whatif", "--out w.gif", "--out w.gif: its ending is not .svg or .png or .json"),
        ("whatif", "--values 1,nan", "rate: nan is not a number above 0"),
        ("whatif", "--values 0", "rate: 0.0 is not a number above 0"),
        ("whatif", "--values 1,,2", "values '1,,2' are not numbers with commas between"),
    ],
)
def test_wrong_options(folder: Path, command: str, options: str, words: str) -> None:
    _expect(f"{COMMANDS[command]} {options}", words)
    assert sorted(path.name for path in folder.iterdir()) == ["fleet.yaml", "plan.yaml", "t.parquet"]
