"""The chart's Serve config on a real Ray with its dashboard, sent there as KubeRay does: the platform comes up from it,
keeps its controller, and takes another config."""

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.deployments.served import free_port
from tests.helm.rendered import ci_values, platform_text, render, serve_config

pytestmark = pytest.mark.ray

_TIMEOUT_S = 120.0
_TOKEN = secrets.token_hex(32)
_SHOWN = {"authorization": f"Bearer {_TOKEN}"}
_RAY = """
import json, sys
from loraplex.config.platform import parse_platform_config
from loraplex_deployments.proxy import ServeProxy

# What the chart sets in the pods' environment; single_machine gives HAProxy files of its own.
proxy = ServeProxy(parse_platform_config(sys.argv[1], source="test"))
import ray

context = ray.init(address="local", num_cpus=4, resources={"loraplex_gateway": 1}, object_store_memory=100 << 20,
                   include_dashboard=True, dashboard_port=int(sys.argv[2]), log_to_driver=False)
print(context.dashboard_url, flush=True)
for command in sys.stdin:
    try:
        controller = ray.get_actor("loraplex-controller", namespace="loraplex")
    except ValueError:
        print("none", flush=True)
        continue
    if command.strip() == "kill":
        ray.kill(controller)
    print(controller._actor_id.hex(), flush=True)
ray.shutdown()
proxy.close()
"""


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.http_port, self.grpc_port = free_port(), free_port()
        self.gateway_port = free_port()
        key = folder / "key"
        key.write_text("lpx_administrators_key_of_this_test\n")
        self.admin = {"authorization": f"Bearer {key.read_text().strip()}"}
        self.folder = folder
        self.config = self.serve_config(max_n=4)
        platform = json.loads(self.config["applications"][0]["args"]["config"])
        platform["ray"] = {"address": "auto", "single_machine": True}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _RAY, json.dumps(platform), str(free_port())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ
            | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _TOKEN}
            | {"RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(self.gateway_port)}
            | {"RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(self.gateway_port + 50)},
        )
        self.dashboard = f"http://{self._read()}"

    def serve_config(self, *, max_n: int) -> dict[str, Any]:
        """The chart's, with this machine's paths and ports."""
        values = ci_values("cpu")
        values["platform"] |= {
            "base_models": [{"id": "tiny", "model": "random:tiny-llama", "executor": {"num_pages": 64}}],
            "gateway": {"max_n": max_n},
            "serve": {},
        }
        values["secrets"]["databaseUrl"] = {"name": "database", "key": "url"}
        manifests = render(values)
        config = serve_config(manifests)
        platform = json.loads(platform_text(manifests))
        platform |= {
            "data_dir": str(self.folder / "data"),
            "admin_key_file": str(self.folder / "key"),
            "listen": {"host": "127.0.0.1", "http_port": self.http_port, "grpc_port": self.grpc_port},
        }
        (self.folder / "url").write_text(f"sqlite:///{self.folder / 'elsewhere.db'}\n")
        for application in config["applications"]:
            assert application["args"]["database_url_file"] == "/etc/loraplex/database/url"
            application["args"] = {"config": json.dumps(platform), "database_url_file": str(self.folder / "url")}
        config["http_options"] = {"host": "127.0.0.1", "port": self.http_port}
        config["grpc_options"]["port"] = self.grpc_port
        # One proxy: HAProxy's files are one set on this machine.
        return config | {"proxy_location": "HeadOnly"}

    def put(self, config: dict[str, Any]) -> None:
        """As the operator does."""
        url = f"{self.dashboard}/api/serve/applications/"
        httpx.put(url, json=config, headers=_SHOWN, timeout=120).raise_for_status()

    def applications(self) -> dict[str, Any]:
        url = f"{self.dashboard}/api/serve/applications/"
        return dict(httpx.get(url, headers=_SHOWN, timeout=60).json()["applications"])

    def controller(self, command: str = "") -> str:
        """Ray's id of the actor, or ``none``; ``kill`` ends it for good."""
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self._read()

    def complete(self, **options: Any) -> httpx.Response:
        """As the tenant of the chart's config, with a key that the administrator makes."""
        url = f"http://127.0.0.1:{self.http_port}/v1"
        made = httpx.post(f"{url}/tenants/acme/keys", json={}, headers=self.admin, timeout=60).raise_for_status()
        return httpx.post(
            f"{url}/completions",
            json={"model": "tiny", "prompt": "Hello", "max_tokens": 4, "ignore_eos": True, **options},
            headers={"authorization": f"Bearer {made.json()['key']}"},
            timeout=60,
        )

    def completes(self, **options: Any) -> bool:
        try:
            return self.complete(**options).status_code == 200
        except httpx.HTTPError:
            return False

    def serves(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.http_port}/ready", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def _read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line, "the cluster's process has ended"
        return line


def wait(condition: Callable[[], bool], state: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + _TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s, json.dumps(state(), default=str)
        time.sleep(0.2)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    assert cluster.process.stdin is not None
    cluster.process.stdin.close()
    cluster.process.wait(60)


@pytest.mark.timeout(500)
def test_the_platform_runs_from_the_charts_serve_config(cluster: Cluster) -> None:
    cluster.put(cluster.config)
    wait(cluster.serves, cluster.applications)
    wait(lambda: {a["status"] for a in cluster.applications().values()} == {"RUNNING"}, cluster.applications)
    assert cluster.complete().json()["usage"]["completion_tokens"] == 4
    assert cluster.complete(n=8).status_code == 400, "platform.gateway.max_n"
    # The database is where the mounted URL says, and the config that Ray shows names it nowhere.
    assert (cluster.folder / "elsewhere.db").exists()
    assert not (cluster.folder / "data" / "control.db").exists()
    # What the Service's ports, the gateways' readiness and the ServiceMonitor rely on.
    with grpc.insecure_channel(f"127.0.0.1:{cluster.grpc_port}") as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service="loraplex.v1.Loraplex")
        )
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert httpx.get(f"http://127.0.0.1:{cluster.http_port}/-/healthz", timeout=30).status_code == 200
    # On one node the two applications share the ports; in the chart the gateways have pods of their own.
    scraped = [
        httpx.get(f"http://127.0.0.1:{cluster.gateway_port + index}/metrics", headers=cluster.admin, timeout=30).text
        for index in range(2)
    ]
    assert any('loraplex_tenant_tokens_total{kind="output",tenant="acme"}' in text for text in scraped)

    # A controller that is gone for good is created anew; replicas go on.
    first = cluster.controller("kill")
    wait(lambda: cluster.controller() not in ("none", first), cluster.applications)
    wait(cluster.completes, cluster.applications)

    # Another config replaces controller and replicas; the tenants and keys of the database stay.
    second = cluster.controller()
    cluster.put(cluster.serve_config(max_n=16))
    wait(lambda: cluster.controller() not in ("none", second), cluster.applications)
    wait(lambda: cluster.completes(n=8), cluster.applications)
