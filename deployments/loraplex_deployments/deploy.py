"""Puts the platform on a Ray cluster that runs already, and takes it off again. Called by ``deploy_commands``.

The start path is that of ``loraplex serve``; what it starts goes on when the caller has left. A record in the cluster's
own key-value store says what was deployed and dies with the cluster, so a second call finds it. Only what the record
names is ever removed: not a platform of ``loraplex serve``, and Serve itself only if it came with us.
"""

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import ray
from loraplex.config.platform import PlatformConfig
from loraplex.core.errors import Conflict, Unavailable
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray.exceptions import GetTimeoutError, RayError
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

from loraplex_deployments.actuator import remove_all_replicas
from loraplex_deployments.build_id import build_id
from loraplex_deployments.cluster_nodes import check_builds, check_on_head, missing_room
from loraplex_deployments.control_client import NAMESPACE, controller_handle
from loraplex_deployments.launch import Progress, RunningPlatform, start_platform, stop_controller
from loraplex_deployments.proxy import ServeProxy
from loraplex_deployments.signals import kept_handlers

_KEY = b"deployed"
_KV_NAMESPACE = b"loraplex"
_ANSWER_TIMEOUT_S = 30.0
_CONNECT_TIMEOUT_S = 5.0


class Deployed(msgspec.Struct, frozen=True, kw_only=True):
    """What was put on a cluster."""

    config: PlatformConfig
    build: str
    """As ``build_id``."""
    unix_s: float
    began_serve: bool
    """There was no Ray Serve on the cluster before."""


class Deployment(msgspec.Struct, frozen=True, kw_only=True):
    """What the record says, and what is found."""

    deployed: Deployed
    controller_answers: bool
    gateways_run: bool
    replica_failures: dict[str, str]
    """The last reason for each replica that is down now."""


def deploy(
    config: PlatformConfig,
    *,
    set_up: Callable[[RunningPlatform], None],
    progress: Progress,
    given_up: Callable[[], bool],
    replace: bool,
    timeout_s: float,
) -> bool:
    """Returns True when the platform answers requests, False when ``given_up`` said to stop before. The same config of
    the same build again changes nothing and only waits; what an interrupted call left is removed first. ``set_up``
    makes the first tenants and keys.

    Raises BadConfig when this is not the head node, Conflict when another config or build runs there (with ``replace``
    it is removed) or one of ``loraplex serve``, or when a node has another build, Unavailable when there is no cluster
    or the platform does not become ready. Whatever is raised, nothing is left of what this call started.
    """
    with contextlib.closing(ServeProxy(config)):
        with joined(config.ray.address):
            check_on_head()
            check_builds(build_id())
            found = find_deployment()
            if found is not None and _runs(found, config):
                progress("this is deployed already")
                set_up(_platform(config))
                _wait_ready(_platform(config), config, progress, given_up, timeout_s)
                return not given_up()
            if found is not None:
                _check_replaceable(found, config, replace)
                progress("removing what was deployed before")
                _remove(found.deployed)
            elif _controller() is not None:
                raise Conflict("a platform of `loraplex serve` runs on this cluster; end that first")
            write_record(config)
        platform = None
        try:
            platform = start_platform(config, progress)
            set_up(platform)
            _wait_ready(platform, config, progress, given_up, timeout_s)
        except BaseException:
            _undo(platform, config, progress)
            raise
        if given_up():
            _undo(platform, config, progress)
            return False
        platform.leave()
        return True


def undeploy(address: str, progress: Progress) -> bool:
    """Removes what ``deploy`` put on the cluster, also half of it; False when there was nothing. Requests that run are
    given up. Data (database, artifacts, traces, keys) stays. Raises Unavailable when there is no cluster."""
    with joined(address):
        record = read_record()
        if record is None:
            return False
        with contextlib.closing(ServeProxy(record.config)):
            progress("removing gateways, controller and replicas")
            _remove(record)
        return True


def find_deployment() -> Deployment | None:
    """Of the cluster that this process has joined."""
    from loraplex_deployments.gateways import gateways_run

    record = read_record()
    if record is None:
        return None
    controller, failures = _controller(), None
    if controller is not None:
        with contextlib.suppress(RayError, GetTimeoutError):
            failures = ray.get(controller.replica_failures.remote(), timeout=_ANSWER_TIMEOUT_S)
    return Deployment(
        deployed=record,
        controller_answers=failures is not None,
        gateways_run=gateways_run(),
        replica_failures={str(name): reason for name, reason in (failures or {}).items()},
    )


@contextlib.contextmanager
def joined(address: str) -> Iterator[None]:
    """This process is a driver of the cluster; a token in ``~/.ray`` is shown to it, which Ray by itself does for
    ``auto`` only. Raises Unavailable when there is none, or it does not let us in."""
    _check_reachable(address)
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    try:
        with kept_handlers():
            ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level="error")
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Unavailable(f"no Ray cluster at {address} that this command can join: {reason}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes."""
    host, colon, port = address.rpartition(":")
    if not colon:
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError, OverflowError) as error:
        raise Unavailable(f"no Ray cluster at {address}: {error}") from None


def differences(old: PlatformConfig, new: PlatformConfig) -> tuple[str, ...]:
    """Keys of the config in which the two differ, two levels deep, but for how the cluster is reached."""

    def flat(config: PlatformConfig) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in msgspec.to_builtins(config).items():
            entries = value.items() if isinstance(value, dict) else [("", value)]
            found |= {f"{name}.{key}".rstrip("."): entry for key, entry in entries}
        return found

    before, after = flat(old), flat(new)
    keys = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    return tuple(key for key in keys if key != "ray.address")


def _runs(found: Deployment, config: PlatformConfig) -> bool:
    same = found.deployed.build == build_id() and not differences(found.deployed.config, config)
    return same and found.controller_answers and found.gateways_run


def _check_replaceable(found: Deployment, config: PlatformConfig, replace: bool) -> None:
    if replace or not found.controller_answers:
        return
    if found.deployed.build != build_id():
        what = f"loraplex {found.deployed.build} is deployed there, this is {build_id()}"
    elif changed := differences(found.deployed.config, config):
        what = f"another config is deployed there; it differs in {', '.join(changed)}"
    else:
        return
    raise Conflict(f"{what}. `loraplex upgrade` goes there while it serves; `--replace` takes it down first")


def _wait_ready(
    platform: RunningPlatform,
    config: PlatformConfig,
    progress: Progress,
    given_up: Callable[[], bool],
    timeout_s: float,
) -> None:
    lacking = missing_room(config)
    progress(f"{lacking}; waiting for nodes to join" if lacking else "waiting for the base models to load")
    try:
        platform.wait_ready(given_up, timeout_s=timeout_s)
    except Unavailable as error:
        lacking = missing_room(config)
        if lacking is None:
            raise
        raise Unavailable(f"{error.message}: {lacking}") from None


def _undo(platform: RunningPlatform | None, config: PlatformConfig, progress: Progress) -> None:
    progress("stopping what was started")
    if platform is not None:
        platform.stop()
    with joined(config.ray.address):
        _forget()


def _remove(record: Deployed) -> None:
    from loraplex_deployments.gateways import stop_gateways

    stop_gateways(whole_serve=record.began_serve)
    controller = _controller()
    if controller is not None:
        stop_controller(controller)
    else:
        remove_all_replicas()
    _forget()


def _platform(config: PlatformConfig) -> RunningPlatform:
    return RunningPlatform(config, controller_handle(), contextlib.ExitStack())


def _controller() -> Any:
    try:
        return controller_handle()
    except Unavailable:
        return None


def write_record(config: PlatformConfig, *, began_serve: bool | None = None) -> None:
    """Before anything is started for ``config`` on the cluster that this process has joined. ``began_serve``: None, as
    is found."""
    from loraplex_deployments.gateways import serve_runs

    began = not serve_runs() if began_serve is None else began_serve
    record = Deployed(config=config, build=build_id(), unix_s=time.time(), began_serve=began)
    _internal_kv_put(_KEY, msgspec.json.encode(record), overwrite=True, namespace=_KV_NAMESPACE)


def read_record() -> Deployed | None:
    """What was deployed on the cluster that this process has joined, or is being deployed. Raises Conflict when another
    version wrote it."""
    held = _internal_kv_get(_KEY, namespace=_KV_NAMESPACE)
    if held is None:
        return None
    try:
        return msgspec.json.decode(held, type=Deployed)
    except msgspec.ValidationError as error:
        raise Conflict(f"what is deployed there was deployed by another version of loraplex: {error}") from None


def _forget() -> None:
    _internal_kv_del(_KEY, namespace=_KV_NAMESPACE)
