"""A platform on a Ray of several nodes on this machine, for measurements of faults and of plan changes.

Each node has a home directory of its own, with its data: the head's holds database, artifacts and traces, the others'
adapter caches. Starts nodes, platform, tenants and adapters, and ends them; knows the processes that may be killed.
Called by ``bench_faults`` and ``bench_replan``.
"""

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import ray
from loraplex.bench.peft_files import write_random_peft
from loraplex.bench.random_adapters import random_manifests
from loraplex.config.platform import PlatformConfig, parse_platform_config
from loraplex.core.errors import Unavailable
from loraplex.core.ids import BaseModelId, ReplicaId, TenantName
from loraplex.core.plan import Shape
from loraplex.core.rollout import FleetStatus
from loraplex.core.tenant import Role, TenantLimits
from loraplex.loadgen.targets import Target
from loraplex.model_runner.build import load_model_spec
from loraplex.tenancy.keys import new_key

from loraplex_deployments.launch import RunningPlatform, data_dir_lock, start_platform
from loraplex_deployments.local_cluster import HEAD, LocalCluster
from loraplex_deployments.ports import free_ports
from loraplex_deployments.replica_handles import find_replica, replica_names

BASE = BaseModelId("bench")
SECOND_BASE = BaseModelId("bench-second")
TENANT = TenantName("bench")
MODEL = "random:tiny-llama"
_LORA_RANK = 16
_HEAD_ONLY = {"node:__internal_head__": 0.001}
_NUM_PAGES = 512
_DATA = "data"
"""Below each node's home."""
_SETTLE_TIMEOUT_S = 180.0


class PacedSetup(msgspec.Struct, frozen=True, kw_only=True):
    """Times of the paced executor: those of a shipped cost profile."""

    profile: str = "h100-80gb"
    base: str = "llama3-8b"
    factor: float = 4.0
    """How many times slower, so that a small machine's own work stays small beside it."""


class ClusterSetup(msgspec.Struct, frozen=True, kw_only=True):
    nodes: int = 3
    """Beside the head, which holds controller and gateways."""
    gpus_per_node: int = 2
    """Logical ones."""
    replicas: int = 4
    gateways: int = 1
    adapters: int = 8
    proxy: str = "haproxy"
    shape: Shape = Shape()
    """Of each replica, until a plan says otherwise."""
    paced: PacedSetup | None = None
    """None: the replicas compute, a tiny model with random weights."""
    second_model: str | None = None
    """Of ``SECOND_BASE``, which is configured like the first one and has no replica until a plan says so."""

    @property
    def executor(self) -> str:
        """What the replicas run, in words."""
        if self.paced is None:
            return "a tiny model with random weights on the CPU"
        return f"paced: {self.paced.base} on {self.paced.profile}, {self.paced.factor:g} times slower"


class BenchCluster:
    """A platform that is ready."""

    def __init__(
        self, cluster: LocalCluster, platform: RunningPlatform, setup: ClusterSetup, *, key: str, homes: Path
    ) -> None:
        self._homes = homes
        self.cluster = cluster
        self.platform = platform
        self.setup = setup
        self.key = key
        self.models = [f"adapter-{index}" for index in range(setup.adapters)] or [str(BASE)]

    @property
    def url(self) -> str:
        return self.platform.http_url

    @property
    def targets(self) -> tuple[Target, ...]:
        return tuple(Target(tenant=str(TENANT), model=model, key=self.key) for model in self.models)

    def data_of(self, node: str) -> Path:
        """Where ``data_dir`` is on a node, also on one that was killed."""
        return self._homes / node / _DATA

    def status(self) -> FleetStatus:
        status: FleetStatus = self.platform.call("fleet_status")
        return status

    def wait_settled(self) -> float:
        """Until the machines are as the plan in force says; how many seconds that took. Unavailable when they do not
        get there."""
        begun_s = time.monotonic()
        while time.monotonic() - begun_s < _SETTLE_TIMEOUT_S:
            with contextlib.suppress(ray.exceptions.RayActorError):
                if self.status().settled:
                    return time.monotonic() - begun_s
            time.sleep(0.05)
        raise Unavailable(f"not settled after {_SETTLE_TIMEOUT_S:.0f} s: {self.status()}")

    def replica_ids(self) -> tuple[ReplicaId, ...]:
        return tuple(sorted(name.replica_id for name in replica_names()))

    def process_of(self, replica_id: ReplicaId) -> psutil.Process:
        found = find_replica(replica_id)
        assert found is not None, f"replica {replica_id} does not run"
        return psutil.Process(ray.get(found[1].__ray_call__.remote(_pid)))

    def processes(self, title: str) -> list[psutil.Process]:
        """On the head, with ``title`` in their command line."""
        found = []
        for process in self.cluster.processes("head"):
            with contextlib.suppress(psutil.Error):
                if title in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def busiest_replica(self) -> ReplicaId:
        """That with most requests."""
        return max(self.replica_ids(), key=self._num_unfinished)

    def ranks(self) -> list[psutil.Process]:
        """Of all replicas of several ranks that compute."""
        return [
            process
            for index in range(self.setup.nodes)
            for process in self.cluster.processes(node_name(index))
            if "RankActor" in " ".join(process.cmdline())
        ]

    def ranks_of(self, replica_id: ReplicaId) -> list[psutil.Process]:
        """Those that its engine has connections to."""
        ends = {(end.raddr, end.laddr) for end in self.process_of(replica_id).net_connections("tcp") if end.raddr}
        return [
            process
            for process in self.ranks()
            if any((end.laddr, end.raddr) in ends for end in process.net_connections("tcp"))
        ]

    def _num_unfinished(self, replica_id: ReplicaId) -> int:
        found = find_replica(replica_id)
        return 0 if found is None else int(ray.get(found[1].num_unfinished.remote()))

    def add_node(self, index: int) -> None:
        gpus = self.setup.gpus_per_node
        self.cluster.add_node(node_name(index), num_cpus=gpus, num_gpus=gpus)


def node_name(index: int) -> str:
    return f"node-{index}"


@contextlib.contextmanager
def bench_cluster(setup: ClusterSetup, say: Callable[[str], None]) -> Iterator[BenchCluster]:
    """Raises what ``start_platform`` raises."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loraplex-bench-")))
        stack.enter_context(_home(folder / HEAD))
        stack.enter_context(data_dir_lock(folder / HEAD / _DATA))
        say(f"starting {setup.nodes} nodes with {setup.gpus_per_node} logical GPUs each")
        cluster = LocalCluster(head_cpus=2, homes=folder)
        stack.callback(cluster.close)
        for index in range(setup.nodes):
            gpus = setup.gpus_per_node
            cluster.add_node(node_name(index), num_cpus=gpus, num_gpus=gpus)
        platform = start_platform(platform_config(setup, cluster.address), say)
        stack.callback(platform.stop)
        key = new_key()
        platform.call("ensure_tenant", str(TENANT), TenantLimits())
        platform.call("ensure_key", TENANT, Role.MEMBER, key)
        _register_adapters(platform, setup, folder)
        say(f"waiting for {setup.replicas} replicas")
        platform.wait_ready()
        bench = BenchCluster(cluster, platform, setup, key=key, homes=folder)
        bench.wait_settled()
        yield bench


@contextlib.contextmanager
def _home(folder: Path) -> Iterator[None]:
    """Of this process, which starts the platform as on the head."""
    before = os.environ.get("HOME")
    folder.mkdir()
    os.environ["HOME"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["HOME"]
        else:
            os.environ["HOME"] = before


def platform_config(setup: ClusterSetup, address: str) -> PlatformConfig:
    http_port, grpc_port = free_ports(2)
    base: dict[str, Any] = {
        "id": BASE,
        "model": MODEL,
        "num_cpus": 0.5,
        "num_gpus": 1,
        "replicas": setup.replicas,
        "executor": {"num_threads": 1},
    }
    shape = msgspec.to_builtins(setup.shape)
    if setup.paced is None:
        base["executor"] |= shape | {"num_pages": _NUM_PAGES}
    else:
        base["paced"] = msgspec.to_builtins(setup.paced) | shape
    settings = {
        "data_dir": f"~/{_DATA}",
        "listen": {"http_port": http_port, "grpc_port": grpc_port},
        "ray": {"address": address, "single_machine": True},
        "serve": {"proxy": setup.proxy, "gateways": setup.gateways, "gateway_resources": _HEAD_ONLY},
        # A node that comes back after a fault is to be used at once.
        "controller": {"fleet": {"node_hold_s": 0.0}},
        "base_models": [base],
    }
    if setup.second_model is not None:
        settings["base_models"] = [base, base | {"id": SECOND_BASE, "model": setup.second_model, "replicas": 0}]
    return parse_platform_config(json.dumps(settings), source="bench")


def _register_adapters(platform: RunningPlatform, setup: ClusterSetup, folder: Path) -> None:
    spec = load_model_spec(MODEL, BASE)
    for index, manifest in enumerate(random_manifests(spec, count=setup.adapters, lora_ranks=(_LORA_RANK,))):
        directory = folder / "new-adapter"
        write_random_peft(directory, manifest, spec, seed=index)
        platform.call("ensure_adapter", TENANT, f"adapter-{index}", str(directory))
        shutil.rmtree(directory)


def _pid(_actor: object) -> int:
    return os.getpid()
