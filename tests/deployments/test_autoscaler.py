"""Ray's own autoscaler brings the nodes that a plan's groups wait for, and takes them back when the platform is gone.

Its provider makes the nodes on this machine, as Ray's processes with logical GPUs.
"""

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray
from loraplex_deployments.ports import free_port
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from tests.deployments.deployed import Config, loraplex
from tests.deployments.joined_cluster import ENVIRONMENT

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

_TIMEOUT_S = 120.0
_WORKER = "h100"


class AutoscaledCluster:
    """A head without GPUs, and at most one worker with two, which is made when somebody asks for it."""

    def __init__(self, folder: Path) -> None:
        port = free_port()
        self.address = f"{ray.util.get_node_ip_address()}:{port}"
        self._gcs = (ray.util.get_node_ip_address(), port)
        self._log = folder / "ray.log"
        config = {
            "cluster_name": "autoscaled",
            "max_workers": 1,
            "idle_timeout_minutes": 0.1,
            "provider": {
                # By its module: Ray's package has no defaults for the type that means it.
                "type": "external",
                "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
                "head_node_id": FAKE_HEAD_NODE_ID,
                "gcs_address": self.address,
                "launch_multiple": True,
            },
            "auth": {},
            "file_mounts": {},
            "cluster_synced_files": [],
            **{f"{of}setup_commands": [] for of in ("", "head_", "worker_")},
            **{f"{of}_start_ray_commands": [] for of in ("head", "worker")},
            "initialization_commands": [],
            "head_node_type": "ray.head.default",
            "available_node_types": {
                # The name that the provider gives the head.
                "ray.head.default": {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 0},
                _WORKER: {
                    "resources": {"CPU": 4, "GPU": 2, "object_store_memory": 100 << 20},
                    "node_config": {},
                    "min_workers": 0,
                    "max_workers": 1,
                },
            },
        }
        file = folder / "autoscaling.json"
        file.write_text(json.dumps(config))
        start = ["start", "--head", "--block", f"--port={port}", "--node-name=head"]
        start += ["--num-cpus=2", "--num-gpus=0", f"--object-store-memory={100 << 20}", "--include-dashboard=false"]
        start += ["--disable-usage-stats", f"--autoscaling-config={file}"]
        with self._log.open("w") as log:
            self._process = psutil.Popen(
                [str(Path(sys.executable).parent / "ray"), *start],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=ENVIRONMENT
                | {
                    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                    "RAY_FAKE_CLUSTER": "1",
                    "RAY_enable_autoscaler_v2": "1",
                    "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
                    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
                },
            )
        self.wait(self._answers, "the head is up")

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(self._gcs, timeout=1):
            return len(self.nodes()) == 1
        return False

    def nodes(self) -> list[str]:
        """Names of the nodes that live, by Ray's daemons."""
        return [p.name() for p in self._processes() if p.name() == "raylet"]

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline_s = time.monotonic() + _TIMEOUT_S
        while not condition():
            assert self._process.is_running(), self._log.read_text()
            assert time.monotonic() < deadline_s, f"not so after {_TIMEOUT_S:.0f} s: {what}\n{self._log.read_text()}"
            time.sleep(0.5)

    def close(self) -> None:
        processes = self._processes()
        for process in processes:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(processes, timeout=30)

    def _processes(self) -> list[psutil.Process]:
        try:
            return [self._process, *self._process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[AutoscaledCluster]:
    cluster = AutoscaledCluster(tmp_path)
    yield cluster
    cluster.close()


def test_nodes_come_for_the_plan_and_go_with_the_platform(cluster: AutoscaledCluster, tmp_path: Path) -> None:
    config = Config(tmp_path, cluster)
    (base,) = config.content["base_models"]  # type: ignore[misc]
    base |= {"num_gpus": 1, "replicas": 2}
    config.content["controller"] = {"fleet": {"autoscale": True}}
    deployed = config.deploy("--timeout", "200")
    assert deployed.returncode == 0, deployed.stdout + deployed.stderr
    assert len(cluster.nodes()) == 2
    assert config.complete().status_code == 200
    ended = loraplex("undeploy", "--address", cluster.address)
    assert ended.returncode == 0, ended.stderr
    cluster.wait(lambda: len(cluster.nodes()) == 1, "the worker has gone")
