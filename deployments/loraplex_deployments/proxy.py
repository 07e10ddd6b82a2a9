"""Which proxy Ray Serve puts in front of the gateways, HAProxy or its own Python proxies, and how it runs them.

Serve reads this from the environment, once, when ``ray.serve`` is imported, in our process and in every process of Ray.
Owns those variables while a platform runs, and the private directory of a local HAProxy. ``start_platform`` calls it
before anything imports ``ray.serve``.
"""

import contextlib
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import distribution
from pathlib import Path

from loraplex.config.platform import PlatformConfig
from loraplex.core.errors import BadConfig, Conflict

from loraplex_deployments.haproxy_exec import BINARY_VARIABLE, haproxy_binary
from loraplex_deployments.ports import free_ports
from loraplex_deployments.request_ids import CALLBACK

_SWITCH = "RAY_SERVE_ENABLE_HA_PROXY"
_MIDDLEWARES = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
_OWN_THREAD = "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD"
"""A gateway never blocks its event loop, so it shares Serve's: no message of a request changes threads, and no two
threads wait for each other's turn to compute."""
_COMMAND = "loraplex-haproxy"
_MAX_THREADS = 4
_LONGEST_STREAM_S = 3600
"""A stream outlives a reload of haproxy (a gateway came or went) by at most this."""
_DRAINING = "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"
_DRAINING_S = 5
"""A gateway that goes takes requests so long, until every HAProxy has heard."""
_READY_CHECK_S = 60
"""A proxy that takes longer to start, on a busy machine too, is started anew."""
_STREAMS_PER_CONNECTION = 1024
"""Concurrent calls over one gRPC channel."""
_FILES_PER_CONNECTION = 3
"""Two sockets, and half a pipe for splicing, rounded up."""


class ServeProxy:
    """The environment of one platform's proxy."""

    def __init__(self, config: PlatformConfig) -> None:
        """Raises BadConfig when there is no haproxy, Conflict when ``ray.serve`` is imported with the other setting."""
        self.haproxy = config.serve.proxy == "haproxy"
        self._directory: Path | None = None
        self._link = config.root / "haproxy"
        _check_import(self.haproxy)
        variables = proxy_variables(config)
        if self.haproxy and (config.ray.address == "local" or config.ray.single_machine):
            variables |= self._private()
        self._before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        self.variables: Mapping[str, str] = variables

    def close(self) -> None:
        """The environment as it was; the private directory is removed."""
        restore(self._before)
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._link.unlink(missing_ok=True)

    def _private(self) -> dict[str, str]:
        """Files and ports of a HAProxy beside others on this machine. ``data_dir``/haproxy leads to the files.

        They lie under /tmp, since a Unix socket's path holds 107 bytes, of which Serve uses 80 below this directory.
        """
        if self._link.is_symlink():  # of a platform that was killed: one at a time runs in a data directory
            shutil.rmtree(self._link.resolve(), ignore_errors=True)
            self._link.unlink()
        self._link.parent.mkdir(parents=True, exist_ok=True)
        directory = Path(tempfile.mkdtemp(prefix="lpx-", dir="/tmp"))
        self._link.symlink_to(directory)
        self._directory = directory
        http_port, grpc_port = free_ports(2)
        return {
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(directory / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(directory / "admin.sock"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(directory / "metrics.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(directory),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(directory / "server-state"),
            # Serve's Python proxy stands by behind HAProxy, for requests that find no gateway.
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(http_port),
            "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(grpc_port),
            _DRAINING: "0",  # no HAProxy of another machine has to hear that a gateway goes
        }


@contextlib.contextmanager
def serve_environment(config: PlatformConfig) -> Iterator[None]:
    """For a process that talks to a Serve which runs already: what the same config has set for it. Raises as
    ``ServeProxy`` does."""
    variables = proxy_variables(config)
    _check_import(config.serve.proxy == "haproxy")
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        restore(before)


def restore(before: Mapping[str, str | None]) -> None:
    """Environment variables as they were."""
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def proxy_variables(config: PlatformConfig) -> dict[str, str]:
    """What Serve reads of its proxy and for its gateways, for a node of its own. Raises BadConfig when there is no
    haproxy here."""
    haproxy = config.serve.proxy == "haproxy"
    variables = {_SWITCH: str(int(haproxy)), _MIDDLEWARES: CALLBACK, _OWN_THREAD: "0"}
    return variables | {BINARY_VARIABLE: _haproxy_command(), **_settings(config)} if haproxy else variables


def _settings(config: PlatformConfig) -> dict[str, str]:
    """For long token streams: no limit on an idle answer, and an hour on an idle client."""
    return {
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": str(_READY_CHECK_S),
        _DRAINING: str(_DRAINING_S),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(_MAX_THREADS, os.cpu_count() or 1)),
        "RAY_SERVE_HAPROXY_MAXCONN": str(_max_connections(config)),
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(_LONGEST_STREAM_S),
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(_LONGEST_STREAM_S),
        "RAY_SERVE_HAPROXY_H2_FE_MAX_CONCURRENT_STREAMS": str(_STREAMS_PER_CONNECTION),
        "RAY_SERVE_HAPROXY_H2_BE_MAX_CONCURRENT_STREAMS": str(_STREAMS_PER_CONNECTION),
    }


def _max_connections(config: PlatformConfig) -> int:
    """Twice what the gateways take, so that they refuse and HAProxy does not; as many as open files allow."""
    wanted = 2 * config.serve.gateways * config.serve.max_ongoing_requests
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if files == resource.RLIM_INFINITY else min(wanted, files // _FILES_PER_CONNECTION)


def _check_import(haproxy: bool) -> None:
    constants = sys.modules.get("ray.serve._private.constants")
    if constants is not None and haproxy != constants.RAY_SERVE_ENABLE_HA_PROXY:
        other = "python" if haproxy else "haproxy"
        raise Conflict(
            f"serve.proxy: this process has imported ray.serve for `{other}` already; one process serves by one kind"
        )


def _haproxy_command() -> str:
    """The path of ``loraplex-haproxy``. Raises BadConfig when it has no haproxy to become."""
    if not sys.platform.startswith("linux") or haproxy_binary() is None:
        raise BadConfig(
            "serve.proxy: there is no haproxy here (ray[serve] brings it on Linux); set `serve: {proxy: python}`",
            param="serve.proxy",
        )
    for file in distribution("loraplex").files or ():
        if file.name == _COMMAND:
            return str(Path(str(file.locate())).resolve())
    raise BadConfig(f"serve.proxy: the command {_COMMAND} is missing; install loraplex again", param="serve.proxy")
