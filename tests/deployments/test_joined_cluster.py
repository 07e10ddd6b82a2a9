"""``loraplex serve`` on a Ray cluster that somebody else started: what it leaves behind, whether it starts or not, and
how it refuses what is too much."""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from loraplex.testing.tiny_tokenizer import build_tiny_tokenizer

from tests.deployments.conftest import free_port

pytestmark = pytest.mark.ray

LORAPLEX = str(Path(sys.executable).parent / "loraplex")
_ENVIRONMENT = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
"""Of all who meet on the cluster."""
_TIMEOUT_S = 120.0
_CLUSTER = """
import json, sys
import ray
from ray.util.placement_group import placement_group, placement_group_table

ray.init(address="local", num_cpus=4, object_store_memory=100 << 20, include_dashboard=False, log_to_driver=False)

@ray.remote(num_cpus=0)
class Bystander:
    pass

bystander = Bystander.options(name="bystander", namespace="other", lifetime="detached").remote()
ray.get(placement_group([{"CPU": 1}], name="bystanders", lifetime="detached").ready())
print(ray.get_runtime_context().gcs_address, flush=True)
for command in sys.stdin:
    if command.strip() == "crash":
        controller = ray.get_actor("loraplex-controller", namespace="loraplex")
        ray.kill(controller, no_restart=False)
    if command.strip() in ("crash", "replica"):
        (name,) = (a["name"] for a in ray.util.list_named_actors(True) if a["name"].startswith("loraplex-replica-"))
        print(ray.get_actor(name, namespace="loraplex")._actor_id.hex(), flush=True)
        continue
    actors = sorted(actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True))
    groups = sorted(g["name"] for g in placement_group_table().values() if g["state"] != "REMOVED")
    print(json.dumps(actors + groups), flush=True)
"""


class Cluster:
    """A Ray of another process, with an actor and a placement group of somebody else."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_ENVIRONMENT
        )
        self.address = self._read()

    def holds(self) -> list[str]:
        """Names of all actors and placement groups."""
        return list(json.loads(self._ask("")))

    def replica(self) -> str:
        """Ray's id of the replica."""
        return self._ask("replica")

    def crash_controller(self) -> str:
        """Kills it; returns Ray's id of the replica."""
        return self._ask("crash")

    def wait_holds(self, expected: list[str]) -> None:
        deadline_s = time.monotonic() + 30
        while self.holds() != expected:
            assert time.monotonic() < deadline_s, self.holds()
            time.sleep(0.2)

    def _ask(self, command: str) -> str:
        assert self.process.stdin is not None
        print(command, file=self.process.stdin, flush=True)
        return self._read()

    def _read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line, "the cluster ended"
        return line


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    yield cluster
    assert cluster.process.stdin is not None
    cluster.process.stdin.close()
    cluster.process.wait(60)


def write_config(folder: Path, cluster: Cluster, **base: Any) -> tuple[Path, str]:
    """The file, and the address that it serves at."""
    port = free_port()
    config = {
        "data_dir": str(folder / "data"),
        "tenants": [{"name": "acme"}],
        "listen": {"http_port": port, "grpc_port": free_port()},
        "ray": {"address": cluster.address},
        "serve": {"proxy": "python", "max_ongoing_requests": 1},
        "base_models": [{"id": "tiny", "model": "random:tiny-llama", "executor": {"num_pages": 64}, **base}],
    }
    file = folder / "fleet.yaml"
    file.write_text(yaml.safe_dump(config))
    return file, f"http://127.0.0.1:{port}"


def test_nothing_is_left_on_a_joined_cluster_and_nothing_else_is_touched(cluster: Cluster, tmp_path: Path) -> None:
    before = cluster.holds()
    assert before == ["bystander", "bystanders"]

    file, _ = write_config(tmp_path, cluster, tokenizer=str(tmp_path / "missing"))
    failed = subprocess.run(
        [LORAPLEX, "serve", "--config", str(file)], capture_output=True, text=True, timeout=100, env=_ENVIRONMENT
    )
    assert failed.returncode == 2, failed.stderr
    assert "tokenizer" in failed.stderr
    cluster.wait_holds(before)

    tokenizer = build_tiny_tokenizer(tmp_path / "tokenizer")
    file, url = write_config(tmp_path, cluster, tokenizer=str(tokenizer))
    with (tmp_path / "serve.log").open("w") as log:
        served = subprocess.Popen([LORAPLEX, "serve", "--config", str(file)], stdout=log, stderr=log, env=_ENVIRONMENT)
    try:
        wait_ready(served, url, tmp_path / "serve.log")
        ours = [name for name in cluster.holds() if name.startswith("loraplex-")]
        assert [name.split("-")[1] for name in ours] == ["controller", "replica", "group"]
        admin = (tmp_path / "data" / "admin.key").read_text().strip()
        check_request_ids(url)
        check_refusal(url, admin)
        check_adoption(cluster, url, admin)
    finally:
        served.send_signal(signal.SIGINT)
        assert served.wait(60) == 0, (tmp_path / "serve.log").read_text()
    cluster.wait_holds(before)


def wait_ready(served: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline_s = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < deadline_s:
        assert served.poll() is None, log.read_text()
        try:
            if httpx.get(f"{url}/ready", timeout=5).status_code == 200 and "admin key in" in log.read_text():
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise AssertionError(log.read_text())


def check_adoption(cluster: Cluster, url: str, key: str) -> None:
    """A controller that died comes back and goes on with the replica that runs."""

    def status() -> dict[str, Any]:
        content = httpx.get(f"{url}/v1/status", headers={"authorization": f"Bearer {key}"}, timeout=10).json()
        assert isinstance(content, dict)
        return content

    epoch = status()["epoch"]
    replica = cluster.crash_controller()
    deadline_s = time.monotonic() + _TIMEOUT_S
    while not ((now := status())["epoch"] > epoch and now["replicas"]):
        assert time.monotonic() < deadline_s, now
        time.sleep(0.2)
    assert cluster.replica() == replica


def check_request_ids(url: str) -> None:
    """A malformed id is replaced, whoever answers."""
    for path in ("/health", "/no/such/route"):
        answer = httpx.get(f"{url}{path}", headers={"x-request-id": "not a sane id"})
        (request_id,) = answer.headers.get_list("x-request-id")
        assert re.fullmatch("req-[0-9a-f]{24}", request_id)


def check_refusal(url: str, key: str) -> None:
    """One call may be open: an upload holds it until it is let go."""
    headers = {"authorization": f"Bearer {key}"}
    begun, released = threading.Event(), threading.Event()

    def body() -> Iterator[bytes]:
        yield b"--x\r\n"
        begun.set()
        released.wait(30)

    def upload() -> None:
        content_type = {"content-type": "multipart/form-data; boundary=x"}
        httpx.post(f"{url}/t/acme/v1/adapters", content=body(), headers=headers | content_type, timeout=60)

    holding = threading.Thread(target=upload)
    holding.start()
    try:
        assert begun.wait(10)
        deadline_s = time.monotonic() + 10
        while (answer := httpx.get(f"{url}/v1/models", headers=headers, timeout=5)).status_code == 200:
            assert time.monotonic() < deadline_s, "the upload did not arrive"
        assert answer.status_code == 429
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert int(answer.headers["retry-after"]) >= 1
        assert httpx.get(f"{url}/health").status_code == 200
    finally:
        released.set()
        holding.join(60)
    assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 200
