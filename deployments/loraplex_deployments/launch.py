"""Brings the platform up on Ray and takes it down again. Called by ``loraplex serve`` and by the tests.

Owns the order of things and what was started: a local Ray of our own, the controller actor, the Serve application.
Ends these and nothing else. ``gateways`` imports ``ray.serve``, so it is imported inside functions, once ``ServeProxy``
has set what Serve reads at its import.
"""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import ray
from loraplex.config.platform import PlatformConfig
from loraplex.core.errors import BadConfig, Conflict, Unavailable

from loraplex_deployments.control_actor import ControllerActor
from loraplex_deployments.control_client import CONTROLLER_NAME, NAMESPACE
from loraplex_deployments.proxy import ServeProxy

_READY_TIMEOUT_S = 600.0
_STOP_TIMEOUT_S = 20.0

Progress = Callable[[str], None]


class RunningPlatform:
    """What ``start_platform`` started."""

    def __init__(self, config: PlatformConfig, controller: Any, proxy: ServeProxy, *, owns_ray: bool) -> None:
        self._config = config
        self._controller = controller
        self._proxy = proxy
        self._owns_ray = owns_ray

    @property
    def http_url(self) -> str:
        return f"http://{self._config.listen.host}:{self._config.listen.http_port}"

    @property
    def grpc_address(self) -> str:
        return f"{self._config.listen.host}:{self._config.listen.grpc_port}"

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """One method of the controller, blocking."""
        return ray.get(self._controller.call.remote(method, args, kwargs))

    def wait_ready(self, given_up: Callable[[], bool] = lambda: False) -> None:
        """Returns when a request would be served, or when ``given_up`` says so.

        Raises Unavailable with the replica's reason when it cannot start.
        """
        deadline_s = time.monotonic() + _READY_TIMEOUT_S
        while time.monotonic() < deadline_s:
            if given_up():
                return
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.http_url}/ready", timeout=5).status_code == 200:
                    return
            failures: dict[str, str] = ray.get(self._controller.replica_failures.remote())
            if failures:
                replica_id, reason = next(iter(failures.items()))
                raise Unavailable(f"replica {replica_id} cannot start: {reason}")
            time.sleep(0.1)
        raise Unavailable(f"not ready after {_READY_TIMEOUT_S:.0f} s")

    def stop(self) -> None:
        """Gateways first (they send their last trace rows), then the controller, then our Ray and the replicas in it.

        On a cluster that we joined the replicas run on, for the next controller to adopt.
        """
        from loraplex_deployments.gateways import stop_gateways

        stop_gateways(whole_serve=self._owns_ray)
        ray.get(self._controller.stop.remote(), timeout=_STOP_TIMEOUT_S)
        ray.kill(self._controller)
        if self._owns_ray:
            ray.shutdown()
        self._proxy.close()


def start_platform(config: PlatformConfig, progress: Progress) -> RunningPlatform:
    """Starts (or joins) Ray, the controller and the gateways; replicas load in the background: see ``wait_ready``.

    Raises BadConfig for a port in use or an unusable model, Conflict when a platform already runs there.
    """
    listen = config.listen
    owns_ray = config.ray.address == "local"
    if owns_ray:
        _check_port(listen.host, listen.http_port, "http_port")
        haproxy = config.serve.proxy == "haproxy"
        _check_port(listen.host if haproxy else "0.0.0.0", listen.grpc_port, "grpc_port")
    proxy = ServeProxy(config)
    try:
        _start_ray(config, progress)
        progress("starting the controller")
        controller = _start_controller(config)
        progress("starting the gateway")
        _start_gateways(config, proxy, progress)
    except BaseException:
        if owns_ray:
            ray.shutdown()
        proxy.close()
        raise
    return RunningPlatform(config, controller, proxy, owns_ray=owns_ray)


def _start_ray(config: PlatformConfig, progress: Progress) -> None:
    settings = config.ray
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if settings.address == "local":
        progress("starting a local Ray")
        ray.init(
            address="local",
            namespace=NAMESPACE,
            num_cpus=settings.num_cpus,
            num_gpus=settings.num_gpus,
            object_store_memory=settings.object_store_bytes,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
        )
    else:
        progress(f"joining Ray at {settings.address}")
        ray.init(address=settings.address, namespace=NAMESPACE, log_to_driver=False, logging_level="error")


def _start_controller(config: PlatformConfig) -> Any:
    try:
        controller = ControllerActor.options(  # type: ignore[attr-defined]
            name=CONTROLLER_NAME,
            namespace=NAMESPACE,
            lifetime="detached",
            scheduling_strategy=ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
                node_id=ray.get_runtime_context().get_node_id(), soft=False
            ),
        ).remote(config)
    except ValueError:
        raise Conflict("a loraplex controller already runs on this Ray cluster") from None
    try:
        ray.get(controller.start.remote())
    except ray.exceptions.RayTaskError as error:
        ray.kill(controller)
        raise (error.cause if isinstance(error.cause, Exception) else error) from None
    return controller


def _start_gateways(config: PlatformConfig, proxy: ServeProxy, progress: Progress) -> None:
    from loraplex_deployments.gateways import runs_haproxy, start_gateways

    start_gateways(config, proxy)
    found = "haproxy" if runs_haproxy() else "python"
    if found != config.serve.proxy:
        progress(
            f"serve.proxy: this cluster's Serve runs with `{found}` already, so `{config.serve.proxy}` has no effect"
        )


def _check_port(host: str, port: int, name: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise BadConfig(
                f"listen.{name}: cannot listen on {host}:{port}: {error.strerror}; choose another port in the config",
                param=name,
            ) from None


@contextlib.contextmanager
def data_dir_lock(root: Path) -> Iterator[None]:
    """One platform per data directory. Raises Conflict when another process holds it."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        handle = (root / "lock").open("w")
    except OSError as error:
        raise BadConfig(f"data_dir: {root}: {error.strerror}", param="data_dir") from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Conflict(f"another loraplex already serves from {root}") from None
        yield
