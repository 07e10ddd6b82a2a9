"""``loraplex plan``, ``plan diff`` and ``whatif`` on files; what is wrong with them is one line."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import msgspec
import pytest
from click.testing import Result
from loraplex.cli.main import app
from loraplex.core.plan import Plan
from typer.testing import CliRunner

FLEET = """
profiles: [h100-80gb]
nodes:
  - {name: h100, gpu: h100-80gb, gpus: 2, count: 2}
bases: {chat: llama3-8b}
adapters: {lora_rank: 16, ranks: {"t0/a0": 64}}
"""


def _run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    path = tmp_path / "fleet.yaml"
    path.write_text(FLEET)
    return path


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "trace.parquet"
    options = ["--adapters", "8", "--tenants", "2", "--rate", "40", "--duration", "20", "--lengths", "fixed:200,50"]
    result = _run("trace", "synth", "--out", path, "--base", "chat", *options)
    assert result.exit_code == 0, result.output
    return path


def test_a_plan_is_written_scored_compared_and_kept(trace: Path, fleet: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "plan.yaml", tmp_path / "report.json"
    options = [
        "--slo",
        "ttft=500ms,tpot=50ms",
        "--budget",
        "30",
        "--window",
        "0:10",
        "--score-window",
        "10:20",
        "--json",
    ]
    result = _run("plan", "--trace", trace, "--fleet", fleet, "--out", out, "--report", report, *options)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["found"]["evaluations"] <= 30
    assert {"loraplex", "rendezvous", "round robin"} <= {one["policy"] for one in found["policies"]}
    plan = msgspec.yaml.decode(out.read_bytes(), type=Plan)
    assert sum(group.shape.num_ranks for group in plan.groups) <= 4
    assert all(node in ("h100-0", "h100-1") for group in plan.groups for node in group.nodes)
    assert json.loads(report.read_text())["score"]["num_requests"] == found["score"]["num_requests"] > 0
    page = tmp_path / "report.html"
    options = ["--current", out, "--budget", "5", "--no-compare", "--report", page]
    again = _run("plan", "--trace", trace, "--fleet", fleet, *options)
    assert again.exit_code == 0, again.output
    for words in ("Plan for trace.parquet", "The current plan stays", "--budget 5 --seed 0", "2 x 2 h100-80gb"):
        assert words in page.read_text()
    assert "the current plan stays" in again.output
    diff = _run("plan", "diff", out, out, "--fleet", fleet)
    assert diff.exit_code == 0, diff.output
    assert "0 groups change" in diff.output


def test_attainment_under_other_circumstances(trace: Path, fleet: Path, tmp_path: Path) -> None:
    options = ["--vary", "gpus", "--values", "1,0.5", "--budget", "2", "--no-compare", "--json"]
    for name in ("w.json", "w.svg", "w.png"):
        result = _run("whatif", "--trace", trace, "--fleet", fleet, *options, "--out", tmp_path / name)
        assert result.exit_code == 0, result.output
        assert [point["gpus"] for point in json.loads(result.stdout)] == [4, 2]
    assert json.loads((tmp_path / "w.json").read_text()) == json.loads(result.stdout)
    assert (tmp_path / "w.png").read_bytes().startswith(b"\x89PNG")
    picture = ElementTree.parse(tmp_path / "w.svg").getroot()
    tips = ["".join(circle.itertext()) for circle in picture.iter("{http://www.w3.org/2000/svg}circle")]
    assert tips == [f"loraplex, {p['gpus']}: {p['loraplex']:.4g}" for p in reversed(json.loads(result.stdout))]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (("gpu: h100-80gb", "gpu: h100-8gb"), [], "the cost profile has no GPU 'h100-8gb'"),
        (("chat: llama3-8b", "chat: llama9"), [], "the cost profile has no base 'llama9'"),
        (("lora_rank: 16, ", ""), [], "unknown adapter t"),
        (("gpus: 2", "gpus: 0"), [], "Expected `int` >= 1"),
        (("", ""), ["--slo", "ttft=500ms,tpot=1ms"], "no layout of base chat meets ttft 0.5 s and tpot 0.001 s"),
        (("", ""), ["--slo", "tpot=fast"], "'fast' is not a time above 0"),
        (("", ""), ["--slo", "e2e=1s"], "'e2e' is not ttft or tpot"),
        (("", ""), ["--budget", "soon"], "'soon' is not a time above 0"),
        (("", ""), ["--window", "900:901"], "has no rows from 900"),
    ],
)
def test_what_is_wrong_is_one_line(
    trace: Path, fleet: Path, change: tuple[str, str], options: list[str], message: str
) -> None:
    fleet.write_text(FLEET.replace(*change) if change[0] else FLEET)
    result = _run("plan", "--trace", trace, "--fleet", fleet, *options)
    assert result.exit_code in (1, 2)
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_plan_for_gpus_that_do_not_exist_is_refused(trace: Path, fleet: Path, tmp_path: Path) -> None:
    for group, message in (
        ({"name": "g", "shape": {"tp": 1}, "bases": [], "gpu": "a100"}, "group g: the fleet has no GPU of type a100"),
        ({"name": "g", "shape": {"tp": 1}, "bases": [], "nodes": ["x"]}, "group g: the fleet has no node x"),
        ({"name": "g", "shape": {"tp": 8}, "bases": []}, "the groups need 8 GPUs of type h100-80gb, the fleet has 4"),
    ):
        path = tmp_path / "plan.yaml"
        path.write_bytes(msgspec.yaml.encode({"version": 1, "groups": [group]}))
        result = _run("plan", "diff", path, path, "--fleet", fleet)
        assert result.exit_code == 1
        assert message in result.stderr
