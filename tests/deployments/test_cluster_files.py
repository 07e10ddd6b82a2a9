"""Every file of ``cluster-configs/``, offline: Ray takes the cluster files, the platform the fleets, the planner plans
on them."""

import time
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from loraplex.cli.main import app
from loraplex.cli.plan import read_fleet, read_plan
from loraplex.config.platform import load_platform_config
from moto import mock_aws
from ray._private.label_utils import validate_node_label_syntax
from ray._private.resource_and_label_spec import ResourceAndLabelSpec
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.util.accelerators import accelerators
from typer.testing import CliRunner

CLUSTERS = Path(__file__).parents[2] / "cluster-configs"
FILES = sorted(CLUSTERS.glob("*.yaml"))
CLOUDS = [file for file in FILES if file.name != "local.yaml"]
FLEETS = sorted((CLUSTERS / "fleets").glob("*.yaml"))
PLANNED = sorted((CLUSTERS / "planning").glob("*.yaml"))


def prepared(file: Path) -> dict[str, Any]:
    config: dict[str, Any] = prepare_config(yaml.safe_load(file.read_text()))
    return config


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_ray_takes_the_file_and_nodes_need_the_token(file: Path) -> None:
    config = prepared(file)
    validate_config(config)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert "RAY_AUTH_MODE=token" in config[commands][-1]
    assert "token" not in str(config["provider"])


@pytest.mark.parametrize("file", CLOUDS, ids=lambda file: file.name)
def test_the_head_has_no_gpu_and_is_not_spot(file: Path) -> None:
    config = prepared(file)
    head = config["available_node_types"][config["head_node_type"]]
    assert "GPU" not in head["resources"]
    assert not _is_spot(head["node_config"])
    assert head["max_workers"] == 0


@pytest.mark.parametrize("file", CLOUDS, ids=lambda file: file.name)
def test_workers_are_labelled_as_what_they_are_and_bounded(file: Path) -> None:
    config = prepared(file)
    workers = {name: kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]}
    markets = set()
    for kind in workers.values():
        ray_name = kind["labels"]["ray.io/accelerator-type"]
        assert ray_name in vars(accelerators).values()
        assert kind["resources"][f"accelerator_type:{ray_name}"] == 1
        assert kind["resources"]["GPU"] > 0
        assert (kind["labels"]["ray.io/market-type"] == "spot") == _is_spot(kind["node_config"])
        validate_node_label_syntax(kind["labels"])
        resolved = ResourceAndLabelSpec(resources={}, labels=kind["labels"])
        resolved.resolve(is_head=False)
        assert kind["labels"].items() <= resolved.labels.items()
        assert kind["min_workers"] <= kind["max_workers"] <= config["max_workers"]
        markets.add(kind["labels"]["ray.io/market-type"])
    assert markets == {"spot", "on-demand"}
    assert sum(kind["min_workers"] for kind in workers.values()) == 1


def _is_spot(node: dict[str, Any]) -> bool:
    """As AWS says it, or Google."""
    asked = node.get("InstanceMarketOptions", {}).get("MarketType"), node.get("scheduling", {}).get("provisioningModel")
    return "spot" in asked or "SPOT" in asked


@pytest.mark.slow
def test_ray_makes_nodes_of_the_aws_file_and_knows_its_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ray up` as far as the first instance, against an AWS in memory: it says of each machine what the file says."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    (tmp_path / ".ssh").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)
    with mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
        config = prepared(CLUSTERS / "aws.yaml")
        said = {name: dict(kind["resources"]) for name, kind in config["available_node_types"].items()}
        for kind in config["available_node_types"].values():
            kind["resources"] = {}
        found = AWSNodeProvider.fillout_available_node_types_resources(config)
        for name, kind in found["available_node_types"].items():
            assert said[name].items() <= kind["resources"].items()
        ready = bootstrap_aws(found)
        (security_group,) = boto3.client("ec2", region_name=ready["provider"]["region"]).describe_security_groups(
            GroupNames=["loraplex"]
        )["SecurityGroups"]
    ports = {rule.get("FromPort") for rule in security_group["IpPermissions"]}
    assert {22, 8000, 9000} <= ports
    assert all(kind["node_config"]["SecurityGroupIds"] for kind in ready["available_node_types"].values())


def test_every_fleet_with_gpus_can_be_planned_on() -> None:
    assert {file.name for file in PLANNED} == {file.name for file in FLEETS} - {"laptop.yaml"}


@pytest.mark.parametrize("file", PLANNED, ids=lambda file: file.name)
def test_the_planning_file_is_of_the_same_fleet(file: Path) -> None:
    fleet, config = read_fleet(file), load_platform_config(CLUSTERS / "fleets" / file.name)
    planning = config.controller.fleet.planning
    assert fleet.profiles == planning.profiles
    assert fleet.bases == planning.profile_bases
    assert set(fleet.bases) == {base.id for base in config.base_models}
    assert {node.gpu for node in fleet.nodes} <= set(config.ray.gpu_types.values())
    assert all(fleet.engine == base.engine for base in config.base_models)
    gpus = sum(node.num_gpus for node in fleet.all_nodes())
    assert sum(base.replicas * base.num_gpus for base in config.base_models) == gpus


@pytest.mark.parametrize("file", PLANNED, ids=lambda file: file.name)
def test_loraplex_plan_plans_on_it(file: Path, tmp_path: Path) -> None:
    base = next(iter(read_fleet(file).bases))
    trace, out = tmp_path / "trace.parquet", tmp_path / "plan.yaml"
    synth = ["--adapters", "8", "--tenants", "2", "--rate", "20", "--duration", "10", "--lengths", "fixed:200,50"]
    run("trace", "synth", "--out", trace, "--base", base, *synth)
    run("plan", "--trace", trace, "--fleet", file, "--out", out, "--budget", "2", "--no-compare")
    assert read_fleet(file).fitting(read_plan(out), where="plan").groups


def run(*arguments: str | Path) -> None:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
