"""The chart's Serve config on a real Ray with its dashboard, sent there as KubeRay does: the platform comes up from it,
keeps its controller, and takes another config."""

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from loraplex_deployments.ports import free_port

from tests.helm.served_chart import Dashboard, ServedChart, wait

pytestmark = pytest.mark.ray

_TOKEN = secrets.token_hex(32)
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
        self.chart = ServedChart(folder)
        self.gateway_port = free_port()
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
        self.dashboard = Dashboard(self._read(), _TOKEN)

    def serve_config(self, *, max_n: int) -> dict[str, Any]:
        config = self.chart.config({"gateway": {"max_n": max_n}, "serve": {}}, {"executor": {"num_pages": 64}})
        # One proxy: HAProxy's files are one set on this machine.
        return config | {"proxy_location": "HeadOnly"}

    def controller(self, command: str = "") -> str:
        """Ray's id of the actor, or ``none``; ``kill`` ends it for good."""
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line, "the cluster's process has ended"
        return line


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    assert cluster.process.stdin is not None
    cluster.process.stdin.close()
    cluster.process.wait(60)


@pytest.mark.timeout(500)
def test_the_platform_runs_from_the_charts_serve_config(cluster: Cluster) -> None:
    chart, dashboard = cluster.chart, cluster.dashboard
    dashboard.put(cluster.config)
    wait(chart.serves, dashboard.applications)
    wait(dashboard.all_run, dashboard.applications)
    key = chart.make_key()
    assert chart.complete(key).json()["usage"]["completion_tokens"] == 4
    assert chart.complete(key, n=8).status_code == 400, "platform.gateway.max_n"
    # The database is where the mounted URL says, and the config that Ray shows names it nowhere.
    assert (chart.folder / "elsewhere.db").exists()
    assert not (chart.folder / "data" / "control.db").exists()
    # What the Service's ports, the gateways' readiness and the ServiceMonitor rely on.
    with grpc.insecure_channel(f"127.0.0.1:{chart.grpc_port}") as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service="loraplex.v1.Loraplex")
        )
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert httpx.get(f"http://127.0.0.1:{chart.http_port}/-/healthz", timeout=30).status_code == 200
    # On one node the two applications share the ports; in the chart the gateways have pods of their own.
    scraped = [
        httpx.get(f"http://127.0.0.1:{cluster.gateway_port + index}/metrics", headers=chart.admin, timeout=30).text
        for index in range(2)
    ]
    assert any('loraplex_tenant_tokens_total{kind="output",tenant="acme"}' in text for text in scraped)

    # A controller that is gone for good is created anew; replicas go on.
    first = cluster.controller("kill")
    wait(lambda: cluster.controller() not in ("none", first), dashboard.applications)
    wait(chart.completes, dashboard.applications)

    # Another config replaces controller and replicas; the tenants and keys of the database stay.
    second = cluster.controller()
    dashboard.put(cluster.serve_config(max_n=16))
    wait(lambda: cluster.controller() not in ("none", second), dashboard.applications)
    wait(lambda: chart.completes(n=8), dashboard.applications)
