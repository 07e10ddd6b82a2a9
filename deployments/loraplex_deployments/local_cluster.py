"""A Ray cluster of several nodes on one machine, for fault tests and benchmarks: nodes come, and die as by kill -9.

Nodes are Ray's own processes with logical CPUs and GPUs, so that placement is that of a real cluster. All have the same
IP address; each may have a home directory of its own, and sees none of the others'. One per process.
"""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

from loraplex_deployments.own_files import hidden

_OBJECT_STORE_BYTES = 80 << 20
HEAD = "head"
_EMPTY = "empty"


class LocalCluster:
    """Starts the head node, without GPUs. ``close`` ends all processes that it started."""

    def __init__(self, *, head_cpus: int, homes: Path | None = None) -> None:
        """``homes``: holds the home directory of each node, by its name; None: all have that of this process."""
        # Ray gives its workers nice 15: beside other work on this machine they would hardly run.
        os.environ.setdefault("RAY_worker_niceness", "0")
        if homes is not None and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
            # Where Ray asks for a token, it looks for it in the home directory, of which each node has its own.
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        self._homes = homes
        self.own_files = homes is not None
        """No node but the head sees another one's home; False also where this process may not bring that about."""
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": head_cpus,
                "num_gpus": 0,
                "node_name": HEAD,
                "include_dashboard": False,
                "object_store_memory": _OBJECT_STORE_BYTES,
                **self._with_home(HEAD),
            },
        )
        self._nodes: dict[str, Any] = {HEAD: self._cluster.head_node}

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add_node(self, name: str, *, num_cpus: int, num_gpus: int = 0, accelerator: str | None = None) -> None:
        """``accelerator``: Ray's type of its GPUs. Returns when Ray knows the node."""
        with self._others_hidden(name):
            self._nodes[name] = self._cluster.add_node(
                node_name=name,
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                resources={} if accelerator is None else {f"accelerator_type:{accelerator}": 1},
                object_store_memory=_OBJECT_STORE_BYTES,
                **self._with_home(name),
            )

    def processes(self, name: str) -> list[psutil.Process]:
        """Ray's daemons of this node and their workers."""
        daemons = [
            psutil.Process(info.process.pid)
            for infos in self._nodes[name].all_processes.values()
            for info in infos
            if info.process.poll() is None
        ]
        return [*daemons, *(worker for daemon in daemons for worker in daemon.children(recursive=True))]

    def kill_node(self, name: str) -> None:
        """At once, as when its power fails."""
        for process in self.processes(name):
            process.kill()
        # Ray's object reaps what is dead by now.
        self._cluster.remove_node(self._nodes.pop(name), allow_graceful=False)

    def close(self) -> None:
        """Also leaves the cluster, if this process has joined it."""
        ray.shutdown()
        self._cluster.shutdown()

    @contextlib.contextmanager
    def _others_hidden(self, name: str) -> Iterator[None]:
        if self._homes is None:
            yield
            return
        empty = self._homes / _EMPTY
        empty.mkdir(exist_ok=True)
        others = [home for home in self._homes.iterdir() if home.is_dir() and home.name not in (name, _EMPTY)]
        with hidden(others, behind=empty) as own_files:
            self.own_files &= own_files
            yield

    def _with_home(self, name: str) -> dict[str, Any]:
        if self._homes is None:
            return {}
        home = self._homes / name
        home.mkdir(exist_ok=True)
        return {"env_vars": {"HOME": str(home)}}
