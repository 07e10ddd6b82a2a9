"""What a platform's processes compute, read from the processes below this one. Called by the benchmarks."""

import os
import time

import msgspec
import psutil

_ROLES = {
    "gateway": "ServeReplica:loraplex:gateway",
    "haproxy": "haproxy -db",
    "serve_proxy": "ProxyActor",
    "haproxy_manager": "HAProxyManager",
    "replica": "ReplicaActor",
    "controller": "ControllerActor",
}
"""Role -> part of the command line. Everything else of Ray is ``ray``."""
_CLIENT = "multiprocessing"
_MAX_CPU = 0.8


def warn_of_busy_machine(cpu: float) -> None:
    """Prints that times taken while the machine used this share of its CPU tell of the machine, where they do."""
    if cpu > _MAX_CPU:
        print(f"the machine used {cpu:.0%} of its CPU, more than {_MAX_CPU:.0%}: these figures are of no use")


def cpu_seconds() -> dict[str, float]:
    """User and system seconds so far of the processes that a local Ray started for us; client processes left out."""
    totals = dict.fromkeys((*_ROLES, "ray"), 0.0)
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
            times = process.cpu_times()
        except psutil.Error:  # it has ended meanwhile
            continue
        if _CLIENT in title:
            continue
        role = next((role for role, part in _ROLES.items() if part in title), "ray")
        totals[role] += times.user + times.system
    return totals


class CpuUse(msgspec.Struct, frozen=True, kw_only=True):
    """Shares of all cores, between 0 and 1."""

    machine: float
    """Of everything that ran on it."""
    ours: float
    """Of this process and those below it, clients and platform; what died meanwhile is left out."""


class CpuMeter:
    """Counts from its construction on."""

    def __init__(self) -> None:
        self._begun_s = time.monotonic()
        self._before = _seconds_by_process()
        psutil.cpu_percent()

    def read(self) -> CpuUse:
        duration_s = time.monotonic() - self._begun_s
        used_s = sum(seconds - self._before.get(process, 0.0) for process, seconds in _seconds_by_process().items())
        return CpuUse(machine=psutil.cpu_percent() / 100, ours=used_s / duration_s / (os.cpu_count() or 1))


def _seconds_by_process() -> dict[tuple[int, float], float]:
    """(Process id, start) -> user and system seconds."""
    found = {}
    this = psutil.Process()
    for process in (this, *this.children(recursive=True)):
        try:
            times = process.cpu_times()
            found[process.pid, process.create_time()] = times.user + times.system
        except psutil.Error:  # it has ended meanwhile
            continue
    return found
