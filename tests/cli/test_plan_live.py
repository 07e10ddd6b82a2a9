"""Plans of a running cluster: real gateway and controller, machines in memory."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from loraplex.core.ids import BaseModelId
from loraplex.core.plan import AdapterShare, BasePlacement, GroupPlan, Plan, Shape
from loraplex.testing.fake_actuator import FakeActuator
from typer.testing import Result

Call = Callable[..., Result]


@pytest.fixture
def plan(run: Call, fleet_platform: Any) -> Call:
    """``loraplex plan ...`` against the platform."""

    def plan(*arguments: object) -> Result:
        return run("plan", *arguments, "--demo-file", fleet_platform.key_file)

    return plan


def _file(path: Path, version: int, *bases: str, tp: int = 1) -> Path:
    share = AdapterShare(tenant="acme", name="pirate", weight=2.0)
    groups = tuple(
        GroupPlan(
            name=f"group-{index}",
            shape=Shape(tp=tp),
            bases=(BasePlacement(base_model_id=BaseModelId(base), adapters=(share,)),),
        )
        for index, base in enumerate(bases)
    )
    path.write_bytes(msgspec.yaml.encode(Plan(version=version, groups=groups)))
    return path


def test_life_of_a_plan(plan: Call, machines: FakeActuator, tmp_path: Path) -> None:
    assert plan("watch", "--until-settled").exit_code == 0
    assert "plan 0 from config" in plan("status").stdout
    applied = plan("apply", _file(tmp_path / "two.yaml", 3, "tiny-base", "tiny-base"), "--wait")
    assert applied.exit_code == 0, applied.output
    assert "plan 3 is reached" in applied.stdout
    assert machines.num_serving(BaseModelId("tiny-base")) == 2
    status = json.loads(plan("status", "--json").stdout)
    assert status["settled"]
    assert [group["state"] for group in status["groups"]] == ["serving", "serving"]
    assert status["groups"][0]["replicas"][0]["adapters"] == [{"tenant": "acme", "name": "pirate", "weight": 2.0}]
    old = plan("apply", _file(tmp_path / "old.yaml", 2, "tiny-base"))
    assert old.exit_code == 1
    assert "plan version 2 is not above 3" in old.stderr
    assert "plan 4" in plan("apply", tmp_path / "old.yaml", "--renumber", "--wait").stdout
    assert machines.num_serving(BaseModelId("tiny-base")) == 1
    back = plan("rollback", "--wait")
    assert "plan 5 is reached (rollback to 3)" in back.stdout, back.output
    shown = msgspec.yaml.decode(plan("show").stdout.encode(), type=Plan)
    assert shown.groups == msgspec.yaml.decode((tmp_path / "two.yaml").read_bytes(), type=Plan).groups
    states = [(p["version"], p["state"]) for p in json.loads(plan("history", "--json").stdout)]
    assert states == [(5, "settled"), (4, "replaced"), (3, "replaced")]
    assert "rollback to 3" in plan("history").stdout
    kinds = [d["kind"] for d in json.loads(plan("decisions", "--json").stdout)]
    assert kinds == ["settled", "rolled back", "settled", "applied", "settled", "applied"]
    assert "an administrator applied it" in plan("decisions").stdout
    assert "plan 0 is reached" in plan("rollback", 0, "--wait").stdout


FLEET = """
profiles: [h100-80gb]
nodes: [{name: node-1, gpu: h100-80gb, gpus: 2}]
bases: {tiny-base: llama3-8b}
"""


def test_what_it_costs_to_leave_the_plan_in_force(plan: Call, tmp_path: Path) -> None:
    (tmp_path / "fleet.yaml").write_text(FLEET)

    def diff(*files: Path) -> Result:
        return plan("diff", *files, "--fleet", tmp_path / "fleet.yaml")

    one, two = (_file(tmp_path / f"{count}.yaml", count, *["tiny-base"] * count) for count in (1, 2))
    assert plan("apply", one, "--wait").exit_code == 0
    assert "0 groups change" in diff(one).stdout
    more = diff(two)
    assert "1 groups change" in more.stdout, more.output
    assert "group-1" in more.stdout
    assert diff(one, two).stdout == more.stdout
    assert "0 groups change" in diff(two, two).stdout
    (tmp_path / "fleet.yaml").write_text(FLEET.replace("tiny-base", "other"))
    assert "no base 'tiny-base'" in diff(two).stderr
    assert diff(one, one, two).exit_code == 2


def test_a_plan_that_cannot_be(plan: Call, machines: FakeActuator, tmp_path: Path) -> None:
    assert plan("watch", "--until-settled").exit_code == 0
    for version, bases, tp, said in (
        (1, ["nobody"], 1, "this cluster has no base nobody: is the plan for another fleet?"),
        (1, ["tiny-base"], 4, "the plan needs 4 GPUs, this cluster has 2"),
    ):
        refused = plan("apply", _file(tmp_path / "bad.yaml", version, *bases, tp=tp))
        assert refused.exit_code == 1
        assert said in refused.stderr
        assert refused.stderr.count("\n") == 1
    machines.cannot_load = lambda target: "out of memory" if target.shape.tp == 2 else None
    failed = plan("apply", _file(tmp_path / "broken.yaml", 1, "tiny-base", tp=2), "--wait")
    assert failed.exit_code == 1
    assert "plan 1 is failed: group group-0 cannot be started: out of memory" in failed.stderr
    assert plan("watch", "--until-settled").exit_code == 0
    assert machines.num_serving(BaseModelId("tiny-base")) == 1
    assert "accept" not in plan("history").stdout
    assert plan("apply", "--version", 1).stderr.strip() == "error: plan 1 is failed, not proposed (HTTP 409)"
    assert plan("apply").exit_code == 2


def test_only_administrators(run: Call, fleet_platform: Any) -> None:
    refused = run("plan", "status", "--url", fleet_platform.url, "--key", "lpx_acme_key_of_the_tests")
    assert refused.exit_code == 1
    assert "(HTTP 403)" in refused.stderr
