"""Brings the platform up on Ray and takes it down again. Called by ``loraplex serve``, by ``deploy`` and by the tests.

Owns the order of things and what was started: a local Ray of our own, the controller actor and its replicas, Serve if
it did not run yet, the Serve application.
Ends these and nothing else, or leaves them running on a cluster. ``gateways`` imports ``ray.serve``, so it is imported
inside functions, once ``ServeProxy`` has set what Serve reads at its import.
"""

import contextlib
import fcntl
import logging
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

from loraplex_deployments.actuator import remove_all_replicas
from loraplex_deployments.cluster_nodes import HEAD, TOUCH
from loraplex_deployments.control_actor import ControllerActor
from loraplex_deployments.control_client import CONTROLLER_NAME, NAMESPACE, controller_handle
from loraplex_deployments.proxy import ServeProxy
from loraplex_deployments.signals import kept_handlers

logger = logging.getLogger(__name__)

_READY_TIMEOUT_S = 600.0
_STOP_TIMEOUT_S = 20.0

Progress = Callable[[str], None]


class RunningPlatform:
    """What ``start_platform`` started, or ``deploy`` found."""

    def __init__(self, config: PlatformConfig, controller: Any, started: contextlib.ExitStack) -> None:
        """``started`` ends, last first, what was started."""
        self._config = config
        self._controller = controller
        self._started = started

    @property
    def http_url(self) -> str:
        return f"http://{self._config.listen.host}:{self._config.listen.http_port}"

    @property
    def grpc_address(self) -> str:
        return f"{self._config.listen.host}:{self._config.listen.grpc_port}"

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """One method of the controller, blocking."""
        return ray.get(self._controller.call.remote(method, args, kwargs))

    def replica_failures(self) -> dict[str, str]:
        """The last reason for each kind of replica that is down now."""
        failures: dict[str, str] = ray.get(self._controller.replica_failures.remote())
        return failures

    def wait_ready(self, given_up: Callable[[], bool] = lambda: False, *, timeout_s: float = _READY_TIMEOUT_S) -> None:
        """Returns when a request would be served, or when ``given_up`` says so.

        Raises Unavailable with the replica's reason when it cannot start.
        """
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            if given_up():
                return
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.http_url}/ready", timeout=5).status_code == 200:
                    return
            failures = self.replica_failures()
            if failures:
                replica_id, reason = next(iter(failures.items()))
                raise Unavailable(f"replica {replica_id} cannot start: {reason}")
            time.sleep(0.1)
        raise Unavailable(f"not ready after {timeout_s:.0f} s")

    def change_config(self, config: PlatformConfig) -> None:
        """Another controller takes the place of this one; gateways and replicas go on. Raises what its start raises."""
        self._controller = replace_controller(self._controller, config)
        self._config = config

    def stop(self) -> None:
        """Gateways first (they send their last trace rows), with Serve if we started it, then the controller with its
        replicas, then our Ray or our connection to the cluster that we joined. Idempotent."""
        self._started.close()

    def leave(self) -> None:
        """Leaves the cluster, where everything goes on running. ``stop`` then does nothing."""
        self._started.pop_all()
        ray.shutdown()


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
    with contextlib.ExitStack() as started:
        proxy = ServeProxy(config)
        started.callback(proxy.close)
        with kept_handlers():
            _start_ray(config, progress)
        started.callback(ray.shutdown)
        progress("starting the controller")
        controller = _start_controller(config, started)
        progress("starting the gateway")
        _start_gateways(config, proxy, started, progress)
        return RunningPlatform(config, controller, started.pop_all())


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


def _start_controller(config: PlatformConfig, started: contextlib.ExitStack) -> Any:
    controller = create_controller(config)
    started.callback(_stop_present_controller)
    _begin(controller)
    return controller


def _begin(controller: Any) -> None:
    """Raises what its start raises, or Ray's error where its process ended."""
    try:
        ray.get(controller.start.remote())
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, Exception) else error) from None


def create_controller(config: PlatformConfig) -> Any:
    """The actor, on whichever node is the head: Ray restarts it there, also after the head was replaced. Its ``start``
    is yet to be called. Raises Conflict when there is one."""
    try:
        return ControllerActor.options(  # type: ignore[attr-defined]
            name=CONTROLLER_NAME, namespace=NAMESPACE, lifetime="detached", resources={HEAD: TOUCH}
        ).remote(config)
    except ValueError:
        raise Conflict("a loraplex controller already runs on this Ray cluster") from None


def _stop_present_controller() -> None:
    """The one that is there: another may have taken the place of the first."""
    try:
        stop_controller(controller_handle())
    except Unavailable:
        remove_all_replicas()


def stop_controller(controller: Any) -> None:
    """Ends it for good, with all replicas. Blocking."""
    try:
        ray.get(controller.stop.remote(), timeout=_STOP_TIMEOUT_S)
    except (ray.exceptions.RayError, TimeoutError) as error:
        logger.warning("the controller did not stop by itself: %s", error)
    ray.kill(controller)
    # Its own stop has done this, unless it could not.
    remove_all_replicas()


def replace_controller(old: Any, config: PlatformConfig) -> Any:
    """One with this config and this build in the place of ``old``, whose replicas it takes over. Gateways find it by
    name; requests go on meanwhile. Blocking. Raises what its start raises, with no controller left."""
    try:
        ray.get(old.leave.remote(), timeout=_STOP_TIMEOUT_S)
    except (ray.exceptions.RayError, TimeoutError, AttributeError) as error:
        logger.warning("the controller did not leave by itself: %s", error)
    ray.kill(old)
    controller = create_successor(config)
    try:
        _begin(controller)
    except BaseException:
        ray.kill(controller)  # Ray would start it again where its process ended
        raise
    return controller


def create_successor(config: PlatformConfig) -> Any:
    """As ``create_controller``, in the place of one that was just killed. Blocking."""
    deadline_s = time.monotonic() + _STOP_TIMEOUT_S
    while True:
        try:
            return create_controller(config)
        except Conflict:  # Ray has yet to take note of its end
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.05)


def _start_gateways(
    config: PlatformConfig, proxy: ServeProxy, started: contextlib.ExitStack, progress: Progress
) -> None:
    from loraplex_deployments.gateways import runs_haproxy, serve_runs, start_gateways, stop_gateways

    # Serve on a Ray of ours ends with it, without the report of Ray that its controller is gone.
    started.callback(stop_gateways, whole_serve=config.ray.address != "local" and not serve_runs())
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
