"""Brings a running platform to another build or config without breaking a stream. Called by ``upgrade_commands``.

Controller, replicas, gateways, in this order: a controller that goes is replaced without anybody noticing; its
successor replaces the replicas one at a time, whose requests go on elsewhere; gateways end when their own requests
have. Old and new ones work together meanwhile.
"""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import ray
from loraplex.config.platform import PlatformConfig
from loraplex.core.errors import Conflict, Unavailable
from loraplex.core.rollout import FleetStatus

from loraplex_deployments.base_models import base_model_views
from loraplex_deployments.build_id import build_id
from loraplex_deployments.cluster_nodes import check_builds, check_on_head
from loraplex_deployments.control_client import controller_handle
from loraplex_deployments.deploy import differences, find_deployment, joined, write_record
from loraplex_deployments.launch import Progress, RunningPlatform, create_successor, replace_controller
from loraplex_deployments.proxy import serve_environment

FIXED = ("data_dir", "listen", "ray", "serve.proxy", "admin_key_file", "controller.database", "registry.artifact_url")
"""Keys, or sections, that a running platform keeps."""
_POLL_S = 0.5


def upgrade(
    config: PlatformConfig,
    *,
    set_up: Callable[[RunningPlatform], None],
    progress: Progress,
    given_up: Callable[[], bool],
    timeout_s: float,
) -> None:
    """``set_up`` makes what tenants the config has more. ``timeout_s``: for the replicas; one that takes longer is not
    given up, only waited for no more.

    Raises BadConfig when this is not the head or a model cannot be read, Conflict when nothing is deployed, a node has
    another build or a key of ``FIXED`` differs, Unavailable when a replica cannot start: those of before serve on.
    """
    with serve_environment(config), joined(config.ray.address):
        check_on_head()
        check_builds(build_id())
        found = find_deployment()
        if found is None:
            raise Conflict("nothing is deployed there; `loraplex deploy` does that")
        old = found.deployed.config
        check_fixed(old, config)
        base_model_views(config)
        progress(f"from {found.deployed.build} to {build_id()}; {_changes(old, config)}")
        write_record(config, began_serve=found.deployed.began_serve)
        try:
            platform = hand_over(old, config, progress)
        except BaseException:
            write_record(old, began_serve=found.deployed.began_serve)
            raise
        set_up(platform)
        renew(platform, config, progress, given_up=given_up, timeout_s=timeout_s)


def fixed_keys(old: PlatformConfig, new: PlatformConfig) -> tuple[str, ...]:
    """In which the two differ though a running platform keeps them."""
    return tuple(key for key in differences(old, new) if any((key + ".").startswith(fixed + ".") for fixed in FIXED))


def check_fixed(old: PlatformConfig, new: PlatformConfig) -> None:
    """Raises Conflict naming what cannot change while the platform runs."""
    changed = fixed_keys(old, new)
    if changed:
        raise Conflict(f"{', '.join(changed)} cannot change while the platform runs: `loraplex deploy --replace`")


def hand_over(old: PlatformConfig, new: PlatformConfig, progress: Progress) -> RunningPlatform:
    """A controller with the new config. When that cannot start, one with the old config is back and the reason is
    raised; Unavailable when there is none to replace."""
    found = controller_handle()
    progress("replacing the controller")
    try:
        controller = replace_controller(found, new)
    except Exception:
        ray.get(create_successor(old).start.remote())
        raise
    return RunningPlatform(new, controller, contextlib.ExitStack())


def renew(
    platform: RunningPlatform,
    config: PlatformConfig,
    progress: Progress,
    *,
    given_up: Callable[[], bool] = lambda: False,
    timeout_s: float,
) -> None:
    """Waits until the controller has replaced the replicas, then replaces the gateways. Raises Unavailable."""
    _wait_replaced(platform, progress, given_up=given_up, timeout_s=timeout_s)
    progress("replacing the gateways")
    from loraplex_deployments.gateways import deploy_gateways

    deploy_gateways(config)


def _wait_replaced(
    platform: RunningPlatform, progress: Progress, *, given_up: Callable[[], bool], timeout_s: float
) -> None:
    """Looks once at least. Raises Unavailable when it is given up, takes too long, or with what fails."""
    deadline_s = time.monotonic() + timeout_s
    told: Any = None
    while True:
        status: FleetStatus = platform.call("fleet_status")
        failures = platform.replica_failures()
        if failures:
            replica_id, reason = next(iter(failures.items()))
            raise Unavailable(f"replica {replica_id} cannot start: {reason}; those of the old release serve on")
        if given_up():
            raise Unavailable("given up: the controller goes on replacing replicas; gateways are as before")
        if not status.num_outdated and status.settled:
            return
        if (status.num_outdated, status.settled) != told:
            told = (status.num_outdated, status.settled)
            progress(f"replicas of the old release: {status.num_outdated}")
        if time.monotonic() >= deadline_s:
            raise Unavailable(
                f"{status.num_outdated} replicas of the old release after {timeout_s:.0f} s; the controller goes on"
            )
        time.sleep(_POLL_S)


def _changes(old: PlatformConfig, new: PlatformConfig) -> str:
    changed = differences(old, new)
    return f"the config differs in {', '.join(changed)}" if changed else "the same config"
