"""A ``loraplex serve`` process with the demo, in a folder and on ports of its own."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import yaml
from loraplex_deployments.ports import free_port

LORAPLEX = str(Path(sys.executable).parent / "loraplex")
_START_TIMEOUT_S = 150


class Served:
    """Starts one, again and again if asked to, and knows its processes."""

    def __init__(self, folder: Path, models: Path) -> None:
        self.folder = folder
        self.root = folder / "data"
        self.root.mkdir(exist_ok=True)
        if not (self.root / "models").exists():
            (self.root / "models").symlink_to(models)
        self.config = {
            "demo": True,
            "tenants": [{"name": "initech", "limits": {"requests_per_minute": 3}}],
            "data_dir": str(self.root),
            "listen": {"http_port": free_port(), "grpc_port": free_port()},
            "base_models": [{"id": "smollm2-135m-instruct", "model": "demo", "executor": {"num_pages": 200}}],
        }
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        file = self.folder / "fleet.yaml"
        file.write_text(yaml.safe_dump(self.config))
        self.log = (self.folder / "serve.log").open("a")
        self.process = subprocess.Popen(
            [LORAPLEX, "serve", "--config", str(file)],
            stdout=self.log,
            stderr=self.log,
            text=True,
            start_new_session=True,
        )

    def wait_ready(self) -> None:
        assert self.process is not None
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline_s:
            assert self.process.poll() is None, self.output()
            try:
                if httpx.get(f"{self.http}/ready", timeout=5).status_code == 200 and "curl" in self.output():
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
        raise AssertionError(self.output())

    def stop(self) -> None:
        """As Ctrl-C does."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(60)

    def processes(self, word: str = "") -> list[psutil.Process]:
        """Those that it started, with ``word`` in their command line."""
        assert self.process is not None
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if word in " ".join(child.cmdline())]

    def output(self) -> str:
        return (self.folder / "serve.log").read_text()

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.config['listen']['http_port']}"  # type: ignore[index]

    @property
    def demo(self) -> dict[str, object]:
        content = json.loads((self.root / "demo.json").read_text())
        assert isinstance(content, dict)
        return content

    def key(self, tenant: str) -> str:
        return next(entry["key"] for entry in self.demo["tenants"] if entry["name"] == tenant)  # type: ignore[attr-defined]
