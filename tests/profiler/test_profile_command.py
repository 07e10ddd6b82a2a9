"""``loraplex profile`` on a tiny model: the real engine's steps become a profile that loads again."""

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from loraplex.cli.profile import profile_command
from loraplex.core.errors import BadConfig
from loraplex.core.plan import Shape
from loraplex.cost.profile import CostProfile
from loraplex.cost.step_cost import StepComposition
from loraplex.profiler.__main__ import main
from loraplex.profiler.decoding import DecodeRows
from loraplex.profiler.measurement import Measurement
from typer import Typer
from typer.testing import CliRunner

pytestmark = pytest.mark.alone

APP = Typer()
APP.command()(profile_command)
NUM_PAGES = 800
MEASURE = [
    *("--model", "random:tiny-llama", "--threads", "1", "--num-pages", str(NUM_PAGES), "--adapters", "3"),
    *("--max-running", "4", "--max-step-tokens", "64", "--max-request-tokens", "96"),
]


def _run(*arguments: str) -> str:
    result = CliRunner().invoke(APP, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(profile, samples) of one measurement."""
    folder = tmp_path_factory.mktemp("profile")
    out, samples = folder / "p.json", folder / "samples.json"
    shown = _run(*MEASURE, "--out", str(out), "--samples", str(samples), "--rows", str(folder / "rows.json"))
    assert "tiny-llama" in shown
    assert "measured" in shown
    assert "(held out)" in shown
    return out, samples


def test_a_measured_profile(files: tuple[Path, Path]) -> None:
    profile = CostProfile.load(files[0])
    (step,) = profile.steps
    assert (step.base, step.gpu, step.shape, step.source) == ("tiny-llama", "cpu", Shape(), "measured")
    assert step.held_out is not None
    assert step.held_out.steps > 50
    assert 0.0 < step.held_out.median <= step.held_out.p90
    assert profile.gpu("cpu").source == "measured"
    # As many pages as the executor had.
    assert profile.memory("tiny-llama", "cpu", Shape()).num_pages == pytest.approx(NUM_PAGES, abs=1)
    decode = StepComposition.of(decode_rows=[1, 4], kv_tokens=[50, 200])
    one, four = step.cost.latency_s(decode)
    assert 0 < one <= four


def test_rows_of_decode_steps_come_for_each_batch_and_shape(files: tuple[Path, Path]) -> None:
    path = files[0].parent / "rows.json"
    decoding = Measurement.load(files[1]).decoding
    assert decoding is not None
    assert msgspec.json.decode(path.read_bytes(), type=DecodeRows) == decoding
    # Batches of 8 and more are above --max-running.
    assert [(row.batch, row.adapters) for row in decoding.rows] == [(1, 0), (1, 1)]
    # The one is a mean, the other a median: on a busy machine they differ.
    assert all(1 / 4 < row.output_tokens_per_s / (1e3 * row.batch / row.step_ms) < 4 for row in decoding.rows)
    group = msgspec.structs.replace(
        decoding, rows=tuple(msgspec.structs.replace(row, tp=2, step_ms=1.0) for row in decoding.rows)
    )
    for _ in range(2):
        group.add_to(path)
    assert msgspec.json.decode(path.read_bytes(), type=DecodeRows).rows == (*decoding.rows, *group.rows)
    with pytest.raises(BadConfig, match="its rows are of"):
        msgspec.structs.replace(group, model="another").add_to(path)
    path.write_text("{}")
    with pytest.raises(BadConfig, match="not a file of rows"):
        group.add_to(path)


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_a_group_is_measured_in_its_shape(tmp_path: Path, tp: int, pp: int) -> None:
    out, samples = tmp_path / "p.json", tmp_path / "samples.json"
    _run(*MEASURE, "--tp", str(tp), "--pp", str(pp), "--out", str(out), "--samples", str(samples))
    (step,) = CostProfile.load(out).steps
    assert (step.shape, step.source) == (Shape(tp=tp, pp=pp), "measured")
    measurement = Measurement.load(samples)
    fitted, _ = measurement.fitted.arrays()
    if pp == 1:
        assert measurement.lone is None
        assert np.array_equal(step.cost.latency_s(fitted), step.cost.interval_s(fitted))
    else:
        assert measurement.lone is not None
        lone, seconds = measurement.lone.arrays()
        assert len(lone) == len(seconds) > 20
        ratios = step.cost.latency_s(fitted) / step.cost.interval_s(fitted)
        assert 1 <= ratios.min() <= ratios.max() <= pp + 1e-9


def test_samples_are_the_engine_s_own_steps(files: tuple[Path, Path]) -> None:
    measurement = Measurement.load(files[1])
    for samples in (measurement.fitted, measurement.held_out):
        steps, seconds = samples.arrays()
        assert len(steps) == len(seconds)
        assert np.all(seconds > 0)
        tokens, rows = steps.prefill_tokens + steps.decode_rows, steps.prefill_rows + steps.decode_rows
        assert rows.min() >= 1
        assert rows.max() == 4
        assert 16 < tokens.max() <= 64
        # A row reads itself at least.
        assert np.all(steps.kv_tokens >= tokens)
        assert np.all((steps.num_adapters > 0) == (steps.lora_tokens > 0))
        assert np.all((steps.num_adapters > 0) == (steps.adapter_bytes > 0))
    fitted, _ = measurement.fitted.arrays()
    assert fitted.num_adapters.max() == 3
    assert fitted.num_adapters.min() == 0


def test_samples_can_be_fitted_again(files: tuple[Path, Path], tmp_path: Path) -> None:
    again = tmp_path / "again.json"
    _run("--fit", str(files[1]), "--out", str(again))
    assert again.read_bytes() == files[0].read_bytes()


def test_without_the_command_line_s_packages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup = {"model": "random:tiny-llama", "threads": 1, "num_pages": 200, "max_running": 2, "max_step_tokens": 16}
    options = {"setup": setup, "base": "tiny", "gpu": "my-cpu", "num_adapters": 0, "max_request_tokens": 24}
    out, samples = tmp_path / "p.json", tmp_path / "s.json"
    main([str(out), str(samples), json.dumps(options)])
    profile = CostProfile.load(out)
    assert profile.shapes("tiny", "my-cpu") == (Shape(),)
    assert Measurement.load(samples).profile() == profile
    held_out = profile.steps[0].held_out
    assert held_out is not None
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == pytest.approx(
        {name: getattr(held_out, name) for name in held_out.__struct_fields__}
    )


def test_json(files: tuple[Path, Path], tmp_path: Path) -> None:
    shown = json.loads(_run("--fit", str(files[1]), "--out", str(tmp_path / "p.json"), "--json"))
    assert shown["steps"][0]["held_out"]["steps"] > 50


def test_analytic(tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    shown = _run("--analytic", "a100-80gb", "--model", "random:llama3-8b", "--shapes", "1x1,2x2", "--out", str(out))
    assert "17 + 15" in shown, "the cut of two stages, beside 16 + 16"
    assert "2x2" in shown
    profile = CostProfile.load(out)
    assert profile.shapes("llama3-8b", "a100-80gb") == (Shape(), Shape(tp=2, pp=2))
    assert all(step.held_out is None for step in profile.steps)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x.json"], "give one --model"),
        (["--out", "x.json", "--analytic", "h100-80gb"], "give --model at least once"),
        (["--out", "x.json", "--analytic", "h101", "--model", "random:llama3-8b"], "'h101' has no known ceilings"),
        (["--out", "x.json", "--analytic", "h100-80gb", "--model", "random:llama3-8b", "--shapes", "2"], "'2' is not"),
        (["--out", "x.json", "--fit", "absent.json"], r"absent\.json: cannot be read"),
        ([*MEASURE, "--out", "x.json", "--budget-s", "0"], "budget ended"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadConfig, match=message):
        CliRunner().invoke(APP, arguments, catch_exceptions=False)
    assert not (tmp_path / "x.json").exists()
