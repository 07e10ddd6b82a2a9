"""The way of docs/cluster.md over an sshd of our own: `ray up` with ``cluster-configs/local.yaml``, a worker that the
head brings up, `loraplex deploy`, one request, `undeploy`. Ends what it started by process id; no `ray stop`, which
ends everybody's Ray on this machine."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator

import httpx
import pytest
import yaml
from loraplex_deployments.ports import free_port
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.deployments.ssh_hosts import LOCAL, ROOT, WORKER, SshHosts, check_programs, ended_with_us

_JOIN_TIMEOUT_S = 500.0
_EMPTY_TO_REQUEST_S = 360.0
_LORAPLEX = "~/loraplex-env/bin/loraplex"
linux = pytest.mark.skipif(sys.platform != "linux", reason="only on Linux all of 127.0.0.0/8 is this machine")


@contextlib.contextmanager
def started(*, empty: bool) -> Iterator[SshHosts]:
    check_programs()
    with ended_with_us():
        hosts = SshHosts(empty=empty)
        try:
            hosts.start()
            yield hosts
        finally:
            hosts.close()


@pytest.fixture
def hosts() -> Iterator[SshHosts]:
    with started(empty=False) as hosts:
        yield hosts


@linux
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_from_hosts_behind_ssh_to_a_request_and_back(hosts: SshHosts) -> None:
    no_token = hosts.run("ray", "up", "-y", "--no-config-cache", str(hosts.config))
    assert no_token.returncode != 0
    assert "auth_token" in no_token.stdout + no_token.stderr
    assert hosts.run("ray", "get-auth-token", "--generate").returncode == 0
    check_wrong_key(hosts)

    for ignored in (".git", ".venv"):
        (hosts.here / ignored).mkdir()
        (hosts.here / ignored / "file").write_text("large")
    (hosts.here / ".gitignore").write_text(".venv/\n")
    up = hosts.run("ray", "up", "-y", "--no-config-cache", str(hosts.config))
    assert up.returncode == 0, up.stdout + up.stderr
    copied = {path.name for path in (hosts.home / "loraplex").iterdir()}
    assert ".gitignore" in copied
    assert not copied & {".git", ".venv"}
    assert (hosts.home / ".ray" / "auth_token").stat().st_mode & 0o077 == 0
    wait_joined(hosts)

    # The head has no GPU: the replica starts on the worker.
    port = free_port()
    base = {"id": "tiny", "model": "random:tiny-llama", "num_gpus": 1, "executor": {"num_pages": 64}}
    fleet = {
        "data_dir": "~/loraplex-data",
        "tenants": [{"name": "acme"}],
        "listen": {"host": "0.0.0.0", "http_port": port, "grpc_port": free_port()},
        "serve": {"proxy": "python"},
        "base_models": [base],
    }
    (hosts.here / "fleet.yaml").write_text(yaml.safe_dump(fleet))
    sent = hosts.run("ray", "rsync-up", str(hosts.config), "fleet.yaml", "~/fleet.yaml")
    assert sent.returncode == 0, sent.stderr
    deployed = on_head(hosts, f"{_LORAPLEX} deploy --config ~/fleet.yaml --address {hosts.address}")
    assert f":{port}/v1" in deployed

    admin = (hosts.home / "loraplex-data" / "admin.key").read_text().strip()
    url = f"http://127.0.0.1:{port}/v1"
    made = httpx.post(f"{url}/tenants/acme/keys", json={}, headers={"authorization": f"Bearer {admin}"}, timeout=60)
    answer = httpx.post(
        f"{url}/completions",
        json={"model": "tiny", "prompt": "Hello", "max_tokens": 4, "ignore_eos": True},
        headers={"authorization": f"Bearer {made.json()['key']}"},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 4

    (hosts.here / ".ray" / "auth_token").write_text("0" * 64)
    stranger = hosts.run("loraplex", "undeploy", "--address", hosts.address)
    assert stranger.returncode == 1
    assert "no Ray cluster" in stranger.stderr

    assert "removed" in on_head(hosts, f"{_LORAPLEX} undeploy --address {hosts.address}")
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url}/models")


@linux
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_from_an_empty_host_to_an_answer_by_two_commands() -> None:
    """The demo fleet, with packages from the index that pip is set to."""
    with started(empty=True) as host:
        assert host.run("ray", "get-auth-token", "--generate").returncode == 0
        fleet = yaml.safe_load((ROOT / "cluster-configs" / "fleets" / "laptop.yaml").read_text())
        fleet |= {"data_dir": "~/data", "listen": {"http_port": free_port(), "grpc_port": free_port()}}
        (host.here / "fleet.yaml").write_text(yaml.safe_dump(fleet))

        started_s = time.monotonic()
        up = host.run("ray", "up", "-y", "--no-config-cache", str(host.config))
        assert up.returncode == 0, up.stdout + up.stderr
        up_s = time.monotonic() - started_s
        on_head(host, f"{_LORAPLEX} deploy --config ~/loraplex/fleet.yaml --address {host.address}")
        tenant = json.loads((host.home / "data" / "demo.json").read_text())["tenants"][0]
        answer = httpx.post(
            f"http://127.0.0.1:{fleet['listen']['http_port']}/v1/completions",
            json={"model": "pirate", "prompt": "The capital of France is", "max_tokens": 8},
            headers={"authorization": f"Bearer {tenant['key']}"},
            timeout=60,
        )
        took_s = time.monotonic() - started_s
        assert answer.status_code == 200, answer.text
        print(f"`ray up` on an empty host {up_s:.0f} s, an answer after {took_s:.0f} s")
        assert took_s < _EMPTY_TO_REQUEST_S


def check_wrong_key(hosts: SshHosts) -> None:
    config = yaml.safe_load(hosts.config.read_text())
    config["cluster_name"] += "-refused"
    config["auth"]["ssh_private_key"] = str(hosts.folder / "host_key")
    file = hosts.here / "refused.yaml"
    file.write_text(yaml.safe_dump(config))
    refused = hosts.run("ray", "up", "-y", "--no-config-cache", str(file), AUTOSCALER_NODE_START_WAIT_S="1")
    assert refused.returncode != 0
    assert "SSH still not available" in refused.stdout
    assert "Permission denied" in refused.stdout + refused.stderr


def wait_joined(hosts: SshHosts) -> None:
    deadline_s = time.monotonic() + _JOIN_TIMEOUT_S
    while WORKER not in (nodes := hosts.run("loraplex", "deployed", "--address", hosts.address)).stdout:
        assert time.monotonic() < deadline_s, nodes.stdout + nodes.stderr
        time.sleep(1)


def on_head(hosts: SshHosts, command: str) -> str:
    """What it prints."""
    ran = hosts.run("ray", "exec", str(hosts.config), command)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_the_file_is_one_that_ray_takes() -> None:
    config = prepare_config(yaml.safe_load(LOCAL.read_text()))
    validate_config(config)
    assert config["max_workers"] == len(config["provider"]["worker_ips"])
