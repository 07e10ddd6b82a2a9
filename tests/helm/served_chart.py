"""The chart's platform with this machine's paths and ports: the Serve config that KubeRay would send, and calls to what
comes of it."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from loraplex_deployments.ports import free_port

from tests.helm.rendered import ci_values, platform_text, render, serve_config

_TIMEOUT_S = 180.0


def wait(condition: Callable[[], bool], state: Callable[[], object]) -> None:
    """AssertionError with the ``state`` when it does not come."""
    deadline_s = time.monotonic() + _TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s, json.dumps(state(), default=str)
        time.sleep(0.2)


class ServedChart:
    """In a folder of its own, with tenant ``acme`` and base ``tiny``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.http_port, self.grpc_port = free_port(), free_port()
        key = folder / "key"
        key.write_text("lpx_administrators_key_of_this_test\n")
        self.admin = {"authorization": f"Bearer {key.read_text().strip()}"}
        self.url = f"http://127.0.0.1:{self.http_port}"

    def config(self, platform: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
        """The rendered Serve config, with ``platform`` in the values and ``base`` in its one base model."""
        values = ci_values("cpu")
        values["platform"] |= {"base_models": [{"id": "tiny", "model": "random:tiny-llama", **base}], **platform}
        values["secrets"]["databaseUrl"] = {"name": "database", "key": "url"}
        manifests = render(values)
        config = serve_config(manifests)
        text = json.loads(platform_text(manifests)) | {
            "data_dir": str(self.folder / "data"),
            "admin_key_file": str(self.folder / "key"),
            "listen": {"host": "127.0.0.1", "http_port": self.http_port, "grpc_port": self.grpc_port},
        }
        (self.folder / "url").write_text(f"sqlite:///{self.folder / 'elsewhere.db'}\n")
        for application in config["applications"]:
            assert application["args"]["database_url_file"] == "/etc/loraplex/database/url"
            application["args"] = {"config": json.dumps(text), "database_url_file": str(self.folder / "url")}
        config["http_options"] = {"host": "127.0.0.1", "port": self.http_port}
        config["grpc_options"]["port"] = self.grpc_port
        return config

    def make_key(self) -> str:
        """Of the tenant, by the administrator: a write."""
        made = httpx.post(f"{self.url}/v1/tenants/acme/keys", json={}, headers=self.admin, timeout=60)
        return str(made.raise_for_status().json()["key"])

    def complete(self, key: str, *, at: str | None = None, **options: Any) -> httpx.Response:
        """``at``: the URL of one gateway."""
        return httpx.post(
            f"{at or self.url}/v1/completions",
            json={"model": "tiny", "prompt": "Hello", "max_tokens": 4, "ignore_eos": True, **options},
            headers={"authorization": f"Bearer {key}"},
            timeout=60,
        )

    def completes(self, **options: Any) -> bool:
        """With a new key."""
        try:
            return self.complete(self.make_key(), **options).status_code == 200
        except httpx.HTTPError:
            return False

    def serves(self) -> bool:
        return self.readiness() == "200"

    def readiness(self) -> str:
        """The status of ``/ready``, with what stands in the way."""
        try:
            answer = httpx.get(f"{self.url}/ready", timeout=5)
        except httpx.HTTPError as error:
            return repr(error)
        return str(answer.status_code) if answer.status_code == 200 else f"{answer.status_code} {answer.text}"


class Dashboard:
    """Of Ray's head, as the operator speaks to it."""

    def __init__(self, address: str, token: str) -> None:
        self._url = f"http://{address}/api/serve/applications/"
        self._shown = {"authorization": f"Bearer {token}"}

    def put(self, config: dict[str, Any]) -> None:
        httpx.put(self._url, json=config, headers=self._shown, timeout=120).raise_for_status()

    def applications(self) -> dict[str, Any]:
        return dict(httpx.get(self._url, headers=self._shown, timeout=60).json()["applications"])

    def all_run(self) -> bool:
        try:
            found = self.applications()
        except httpx.HTTPError:
            return False
        return {application["status"] for application in found.values()} == {"RUNNING"}
