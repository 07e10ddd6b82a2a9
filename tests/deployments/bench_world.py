"""A cluster with a platform on it, as the benchmarks start them, in a process of its own.

Functions of a test module that run there (``OwnProcess.call``) find the cluster in ``BenchWorld.bench``.
"""

import contextlib
from collections.abc import Iterator

from loraplex_deployments.bench_cluster import BenchCluster, ClusterSetup, bench_cluster

from tests.deployments.own_process import OwnProcess


class BenchWorld:
    """What lives in the process of the cluster."""

    stack = contextlib.ExitStack()
    bench: BenchCluster


@contextlib.contextmanager
def bench_world(setup: ClusterSetup) -> Iterator[OwnProcess]:
    process = OwnProcess(_start, setup)
    try:
        yield process
    finally:
        process.close(_end)


def _start(setup: ClusterSetup) -> None:
    BenchWorld.bench = BenchWorld.stack.enter_context(bench_cluster(setup, print))


def _end() -> None:
    BenchWorld.stack.close()
