"""``loraplex deploy`` on a Ray cluster that somebody else started: what runs on when it has ended, what a second one
does, what is refused, and what ``undeploy`` leaves."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import httpx
import loraplex_deployments
import pytest
import yaml
from loraplex.config.platform import PlatformConfig, parse_platform_config
from loraplex_deployments.deploy import differences
from loraplex_deployments.ports import free_port

from tests.deployments.deployed import Config, loraplex, one_line
from tests.deployments.joined_cluster import ENVIRONMENT, Cluster
from tests.deployments.served import LORAPLEX

BYSTANDERS = ["bystander", "bystanders"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_platform_goes_on_when_deploy_has_ended_and_undeploy_removes_exactly_that(
    cluster: Cluster, tmp_path: Path
) -> None:
    assert cluster.holds() == BYSTANDERS
    address = ("--address", cluster.address)
    assert loraplex("undeploy", *address).stdout.strip() == "nothing is deployed there"
    nothing = loraplex("deployed", *address)
    assert nothing.returncode == 1
    assert "nothing is deployed" in nothing.stdout

    # A command of another build than that of the nodes.
    config = Config(tmp_path, cluster)
    package = Path(loraplex_deployments.__path__[0])
    shutil.copytree(package, tmp_path / "other" / package.name)
    (tmp_path / "other" / package.name / "more.py").touch()
    search_path = f"{tmp_path / 'other'}:{os.environ.get('PYTHONPATH', '')}"
    stranger = loraplex("deploy", "--config", config.write(), *address, PYTHONPATH=search_path)
    assert "install the same on all nodes" in one_line(stranger, 1)

    # What cannot start leaves nothing: no GPU, no tokenizer.
    (base,) = config.content["base_models"]  # type: ignore[misc]
    base["num_gpus"] = 1
    reason = one_line(config.deploy("--timeout", "3"), 1)
    assert "not ready after 3 s" in reason
    assert "1 x (1 CPUs and 1 GPUs)" in reason
    cluster.wait_holds(BYSTANDERS)
    del base["num_gpus"]
    base["tokenizer"] = str(tmp_path / "missing")
    assert "tokenizer" in one_line(config.deploy(), 2)
    cluster.wait_holds(BYSTANDERS)
    del base["tokenizer"]

    deployed = config.deploy()
    assert deployed.returncode == 0, deployed.stdout + deployed.stderr
    assert config.url in deployed.stdout
    assert config.complete().status_code == 200

    # The same again changes nothing; another config is refused and named; a platform of `serve` finds the place taken.
    before = cluster.replica()
    again = config.deploy()
    assert again.returncode == 0, again.stdout + again.stderr
    assert "deployed already" in again.stdout
    config.content["router"] = {"max_queue_wait_s": 7.0}
    assert "it differs in router.max_queue_wait_s" in one_line(config.deploy(), 1)
    served = loraplex("serve", "--config", str(write_serve_config(tmp_path, cluster)))
    assert "already runs" in one_line(served, 1)
    assert cluster.replica() == before
    assert config.complete().status_code == 200

    found = loraplex("deployed", *address, "--json")
    assert found.returncode == 0, found.stdout
    status = json.loads(found.stdout)
    assert [node["is_head"] for node in status["nodes"]] == [True]
    assert status["deployed"]["deployed"]["config"]["data_dir"] == str(config.root)
    assert status["deployed"]["gateways_run"]

    replaced = config.deploy("--replace")
    assert replaced.returncode == 0, replaced.stdout + replaced.stderr
    assert config.complete().status_code == 200
    assert cluster.replica() != before

    removed = loraplex("undeploy", *address)
    assert removed.returncode == 0, removed.stderr
    cluster.wait_holds(BYSTANDERS)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{config.url}/ready")
    assert (config.root / "admin.key").exists()


def write_serve_config(folder: Path, cluster: Cluster) -> Path:
    config = Config(folder, cluster).content
    config |= {"data_dir": str(folder / "served"), "ray": {"address": cluster.address}}
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


@pytest.mark.ray
def test_deploy_that_is_killed_or_given_up_leaves_nothing_for_good(cluster: Cluster, tmp_path: Path) -> None:
    config = Config(tmp_path, cluster)
    (base,) = config.content["base_models"]  # type: ignore[misc]
    base["num_gpus"] = 1
    command = [LORAPLEX, "deploy", "--config", config.write(), "--address", config.address]
    for number, code in ((signal.SIGINT, 1), (signal.SIGKILL, -signal.SIGKILL)):
        log = tmp_path / f"{number}.log"
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, env=ENVIRONMENT)
        deadline_s = time.monotonic() + 100
        while "waiting for nodes" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline_s, log.read_text()
            time.sleep(0.1)
        os.kill(process.pid, number)
        assert process.wait(60) == code, log.read_text()
        if number == signal.SIGINT:
            cluster.wait_holds(BYSTANDERS)
    assert "loraplex-controller" in cluster.holds()
    assert loraplex("undeploy", "--address", cluster.address).stdout.strip().endswith("removed")
    cluster.wait_holds(BYSTANDERS)


def test_where_no_cluster_can_be_joined_one_line_says_so(tmp_path: Path) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_text("base_models: [{id: a, model: 'random:tiny-llama'}]\n")
    for address in ("local", "ray://127.0.0.1:10001"):
        assert "--address" in one_line(loraplex("deploy", "--config", str(file), "--address", address), 2)
    reason = one_line(loraplex("undeploy", "--address", f"127.0.0.1:{free_port()}"), 1)
    assert "no Ray cluster at 127.0.0.1" in reason


def parsed(text: str) -> PlatformConfig:
    return parse_platform_config(f"base_models: [{{id: a, model: demo}}]\n{text}", source="test")


def test_configs_differ_by_key_but_for_the_way_to_the_cluster() -> None:
    old = parsed("ray: {address: auto}\n")
    assert differences(old, parsed("ray: {address: '10.0.0.1:6379'}\n")) == ()
    new = parsed("ray: {num_cpus: 3}\ndata_dir: x\ntenants: [{name: t}]\n")
    assert differences(old, new) == ("data_dir", "ray.num_cpus", "tenants")
