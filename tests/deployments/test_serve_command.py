"""``loraplex serve`` as a person runs it: start, a second start beside it, kill -9 in the middle of an upload, start
again, Ctrl-C. It is the platform of the tests of HAProxy, which come before and have used it."""

import os
import signal
import stat
import subprocess
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from loraplex.demo import JSON

from tests.deployments.served import LORAPLEX, Served

pytestmark = pytest.mark.ray


def loraplex(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([LORAPLEX, *arguments], capture_output=True, text=True, timeout=100)


def test_a_day_in_the_life(behind_haproxy: Served, tmp_path: Path) -> None:
    served = behind_haproxy
    first = served.demo
    assert stat.S_IMODE((served.root / "demo.json").stat().st_mode) == 0o600
    key = served.key("acme")

    # A second platform on the same ports, then in the same data directory: one line each, nothing disturbed.
    beside = dict(served.config, data_dir=str(tmp_path / "other"))
    (tmp_path / "beside.yaml").write_text(yaml.safe_dump(beside))
    refused = loraplex("serve", "--config", str(tmp_path / "beside.yaml"))
    assert refused.returncode == 2
    assert str(served.config["listen"]["http_port"]) in refused.stderr  # type: ignore[index]
    assert "Traceback" not in refused.stderr
    same_dir = loraplex("serve", "--config", str(served.folder / "fleet.yaml"))
    assert same_dir.returncode == 1
    assert "already serves" in same_dir.stderr

    # An adapter is registered, then the process is killed in the middle of uploads of more.
    assert upload(served.http, key, "kept").status_code == 201
    uploads = threading.Thread(target=upload_for_ever, args=(served.http, key), daemon=True)
    uploads.start()
    time.sleep(0.5)
    assert served.process is not None
    children = served.processes()
    assert served.processes("haproxy -db")
    killed_files = (served.root / "haproxy").resolve()
    os.kill(served.process.pid, signal.SIGKILL)
    served.process.wait(10)
    uploads.join(60)
    _, alive = psutil.wait_procs(children, timeout=30)
    # Ray's own agents notice the death of their raylet later; nothing of ours outlives the process.
    assert all("Agent" in process.name() for process in alive)

    said = len(served.output())
    served.start()
    served.wait_ready()
    assert served.demo == first
    assert not killed_files.exists()
    names = [
        entry["name"]
        for entry in httpx.get(f"{served.http}/v1/adapters", headers={"authorization": f"Bearer {key}"}).json()["data"]
    ]
    assert {"pirate", "json", "kept"} <= set(names)
    for name in names:
        answer = httpx.post(
            f"{served.http}/v1/completions",
            json={"model": name, "prompt": "Hello", "max_tokens": 2},
            headers={"authorization": f"Bearer {key}"},
            timeout=60,
        )
        assert answer.status_code == 200, answer.text

    # Ctrl-C ends everything that it started.
    children = served.processes()
    files = (served.root / "haproxy").resolve()
    assert files.stat().st_mode & 0o077 == 0
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(60) == 0
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
    assert not files.exists()
    assert served.output().splitlines()[-1].endswith("stopped")
    assert "(raylet)" not in served.output()[said:], "Ray has nothing to report"
    rows = list((served.root / "traces").rglob("*.parquet"))
    assert rows


def test_an_end_during_the_start_is_heard_and_begins_nothing_more(tmp_path: Path, demo_models: Path) -> None:
    platform = Served(tmp_path, demo_models)
    platform.start()
    assert platform.process is not None
    try:
        while "starting the controller" not in platform.output():
            assert platform.process.poll() is None, platform.output()
            time.sleep(0.05)
        children = platform.processes()
        # As a service manager does. Ray would have us aborted three seconds later.
        platform.process.send_signal(signal.SIGTERM)
        assert platform.process.wait(60) == 0, platform.output()
    finally:
        platform.process.kill()
    assert "stopping" in platform.output()
    assert "starting the gateway" not in platform.output()
    assert "SIGTERM" not in platform.output()
    assert not psutil.wait_procs(children, timeout=30)[1]


def test_an_unknown_config_key_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("base_models: [{id: a, model: demo, engin: {}}]\n")
    answer = loraplex("serve", "--config", str(tmp_path / "bad.yaml"))
    assert answer.returncode == 2
    assert "bad.yaml" in answer.stderr
    assert "engin" in answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1


def upload(http: str, key: str, name: str) -> httpx.Response:
    files = {
        file: (JSON.directory / file).read_bytes() for file in ("adapter_config.json", "adapter_model.safetensors")
    }
    return httpx.post(
        f"{http}/v1/adapters",
        data={"name": name},
        files={file: (file, content) for file, content in files.items()},
        headers={"authorization": f"Bearer {key}"},
        timeout=60,
    )


def upload_for_ever(http: str, key: str) -> None:
    for index in range(1000):
        try:
            upload(http, key, f"torn-{index}")
        except httpx.HTTPError:
            return
