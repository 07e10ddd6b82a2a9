"""``loraplex trace``: the examples of docs/traces.md as they stand, the tables, and one line for what is wrong."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loraplex.traces.arrivals import read_arrivals
from typer.testing import Result

Run = Callable[..., Result]
ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "traces" / "data"


@pytest.fixture
def excerpts(tmp_path: Path) -> Path:
    for path in (*DATA.iterdir(), *(DATA / "public").iterdir()):
        if path.is_file() and path.suffix != ".md":
            shutil.copy(path, tmp_path)
    return tmp_path


def test_examples_of_the_docs(run: Run, excerpts: Path) -> None:
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / "docs" / "traces.md").read_text(), re.DOTALL)
    commands = [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]
    assert len(commands) >= 13
    outputs = {}
    for command in commands:
        words = shlex.split(command)
        assert words[0] == "loraplex"
        result = run(*words[1:])
        assert result.exit_code == 0, f"{command}: {result.output}"
        outputs[command] = result.stdout
    recorded = pq.read_table(excerpts / "alpaserve_gamma_n8_r20_cv4.parquet").column("t").to_pylist()
    assert read_arrivals(excerpts / "gamma.parquet").arrival_s[:500].tolist() == recorded
    busy = read_arrivals(excerpts / "busy.parquet")
    assert (len(busy.adapters), len(busy.tenants), busy.base_models) == (100, 10, ("small", "large"))
    stats = json.loads(next(text for command, text in outputs.items() if command.endswith("--json")))
    assert stats["requests"] == len(busy)
    assert stats["adapters"]["distinct"] == 100
    assert (excerpts / "busy.html").read_text().startswith("<!doctype html>")
    halves = [read_arrivals(excerpts / "halves" / name) for name in ("train.parquet", "test.parquet")]
    assert sum(map(len, halves)) == len(busy)
    assert len(list((excerpts / "windows").iterdir())) == 3
    assert len(list((excerpts / "tenants").iterdir())) == 2
    assert read_arrivals(excerpts / "functions.parquet").arrival_s.max() < 1800


def test_every_command_has_help(run: Run) -> None:
    for command in ("stats", "synth", "convert", "split", "plot"):
        result = run("trace", command, "--help")
        assert result.exit_code == 0
        assert "Usage" in result.output
        assert command in run("trace", "--help").output


@pytest.mark.parametrize("command", [("stats",), ("plot", "-o", "x.html"), ("split", "--train", "0.5", "-o", "x")])
@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (None, "bad.parquet"),
        ({"prompt_tokens": [1]}, "no column arrival_s"),
        ({"timestamp_s": [2.0, 1.0]}, "row 1 arrives at 1.0 s, after one at 2.0 s"),
        ({"timestamp_s": [2.0], "output_tokens": [-3]}, "row 0 has output_tokens -3"),
        ({"timestamp_s": [float("nan")]}, "row 0 has arrival time nan"),
    ],
)
def test_bad_traces_in_one_line(
    run: Run, tmp_path: Path, command: tuple[str, ...], columns: dict[str, list[float]] | None, words: str
) -> None:
    if columns is None:
        (tmp_path / "bad.parquet").write_text("not a Parquet file")
    else:
        pq.write_table(pa.table(columns), tmp_path / "bad.parquet")
    result = run("trace", command[0], "bad.parquet", *command[1:])
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert words in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (("synth", "-o", "x.parquet"), 2, "How long|how long"),
        (("synth", "-o", "x.parquet", "--requests", 5, "--rate", 0), 2, "rate"),
        (("synth", "-o", "x.parquet", "--requests", 5, "--diurnal", "1"), 2, "PERIOD,AMPLITUDE"),
        (("synth", "-o", "x.parquet", "--requests", 5, "--flash", "1,2"), 2, "AT,DURATION"),
        (("synth", "-o", "x.parquet", "--requests", 5, "--drift", "9,0.5"), 2, "whole number"),
        (("synth", "-o", "x.parquet", "--requests", 5, "--on-off", "a,b"), 2, "ON,OFF"),
        (("synth", "-o", "x.parquet", "--requests", 5, "--base", "m=many"), 2, "NAME=SHARE"),
        (("synth", "-o", "x.parquet", "--requests", 5, "--lengths", "huge"), 2, "huge"),
        (("synth", "-o", "nosuch/x.parquet", "--requests", 5), 1, "nosuch"),
        (("convert", "nosuch.csv", "-o", "x.parquet"), 1, "nosuch.csv"),
        (("convert", "nosuch.csv", "-o", "x.parquet", "--window", "5"), 2, "START:END"),
        (("split", "x.parquet", "-o", "out"), 2, "--train"),
        (("split", "x.parquet", "-o", "out", "--train", "0.5", "--by-tenant"), 2, "--train"),
        (("plot", "x.parquet", "-o", "nosuch/x.html"), 1, "nosuch"),
    ],
)
def test_bad_options_in_one_line(run: Run, tmp_path: Path, arguments: tuple[object, ...], code: int, word: str) -> None:
    result = run("trace", *arguments)
    assert result.exit_code == code, result.output
    assert re.search(word, result.stderr)
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.glob("*.parquet")) == []
