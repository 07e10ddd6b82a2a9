"""CPU seconds of a platform's processes by role, read from the processes below this one. Called by the benchmarks."""

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
