"""``loraplex serve`` on a Ray cluster that somebody else started: what it leaves behind, whether it starts or not, and
how it refuses what is too much."""

import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from loraplex.testing.tiny_tokenizer import build_tiny_tokenizer
from loraplex_deployments.ports import free_port

from tests.deployments.joined_cluster import ENVIRONMENT, Cluster
from tests.deployments.served import LORAPLEX

pytestmark = pytest.mark.ray

_TIMEOUT_S = 120.0


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
        [LORAPLEX, "serve", "--config", str(file)], capture_output=True, text=True, timeout=100, env=ENVIRONMENT
    )
    assert failed.returncode == 2, failed.stderr
    assert "tokenizer" in failed.stderr
    cluster.wait_holds(before)

    tokenizer = build_tiny_tokenizer(tmp_path / "tokenizer")
    file, url = write_config(tmp_path, cluster, tokenizer=str(tokenizer))
    with (tmp_path / "serve.log").open("w") as log:
        served = subprocess.Popen([LORAPLEX, "serve", "--config", str(file)], stdout=log, stderr=log, env=ENVIRONMENT)
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
