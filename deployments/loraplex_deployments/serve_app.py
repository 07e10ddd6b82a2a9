"""The platform as two applications of a Serve config, for a RayService: KubeRay sends the config to the cluster's head,
whose Serve imports ``control`` and ``gateways`` from here.

``control`` is one small Serve replica on the head that does what ``deploy`` does, and goes on doing it: it creates the
controller and sees that there is one. ``gateways`` are the same as everywhere. Serve restarts both, and brings them
back on a new head. Who writes the Serve config sets in every process's environment what ``ServeProxy`` would set.
"""

import contextlib
import logging
import time
from typing import Any

import msgspec
import ray
from loraplex.config.platform import PlatformConfig, parse_platform_config
from loraplex.core.errors import LoraplexError, Unavailable
from loraplex.telemetry.logs import configure_logging
from ray import serve

from loraplex_deployments.cli import set_up
from loraplex_deployments.cluster_nodes import HEAD, TOUCH
from loraplex_deployments.control_client import controller_handle, unwrap
from loraplex_deployments.deploy import differences, read_record, write_record
from loraplex_deployments.gateways import gateway_application
from loraplex_deployments.launch import RunningPlatform, create_controller, stop_controller
from loraplex_deployments.upgrade import fixed_keys, hand_over

logger = logging.getLogger(__name__)

_PERIOD_S = 5.0
_START_TIMEOUT_S = 300.0
_CONTROLLER_WAIT_S = 600.0
"""For the controller of a cluster whose applications Serve builds at the same time."""


class AppArgs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``args`` of both applications in the Serve config."""

    config: str
    """The platform's YAML. Without secrets: Ray and Kubernetes show it."""
    database_url_file: str | None = None
    """On the head: holds ``controller.database.url``, in the place of the config's."""

    def platform_config(self) -> PlatformConfig:
        """Raises BadConfig."""
        config = parse_platform_config(self.config, source="platform")
        return msgspec.structs.replace(config, ray=msgspec.structs.replace(config.ray, address="auto"))


def control(args: dict[str, Any]) -> serve.Application:
    """The builder of the first application. Raises BadConfig for a bad platform config."""
    settings = msgspec.convert(args, AppArgs)
    return ControllerKeeper.bind(settings.platform_config(), settings.database_url_file)  # type: ignore[attr-defined]


def gateways(args: dict[str, Any]) -> serve.Application:
    """The builder of the second application; waits for the controller, which gateways need when they start. Raises
    BadConfig for a bad platform config, Unavailable when no controller comes."""
    config = msgspec.convert(args, AppArgs).platform_config()
    _await_controller(config)
    return gateway_application(config)


@serve.deployment(
    name="controller-keeper",
    num_replicas=1,
    ray_actor_options={"num_cpus": 0, "resources": {HEAD: TOUCH}},
    health_check_period_s=_PERIOD_S,
    health_check_timeout_s=_START_TIMEOUT_S,
)
class ControllerKeeper:
    """Serve ends the old one before it starts one with another config, and there is one controller by its name."""

    def __init__(self, config: PlatformConfig, database_url_file: str | None) -> None:
        """Returns when the controller works, with the config's tenants and the administrator's key. One with another
        config is replaced, and replaces the replicas one by one; where a key differs that a running platform keeps, it
        is stopped with its replicas. Raises BadConfig for an unusable model or key file."""
        configure_logging(config.telemetry.logs)
        self._config = config
        self._database_url_file = database_url_file
        self._claim()
        self._keep()
        self._set_up()

    def _claim(self) -> None:
        """From here on this config is what is deployed."""
        record = read_record()
        changed = () if record is None else differences(record.config, self._config)
        if record is not None and changed:
            logger.warning("replacing the controller: the config differs in %s", ", ".join(changed))
            with contextlib.suppress(Unavailable):
                if fixed_keys(record.config, self._config):
                    stop_controller(controller_handle())
                else:
                    old = _with_database(record.config, self._database_url_file)
                    hand_over(old, _with_database(self._config, self._database_url_file), logger.info)
        if record is None or changed:
            write_record(self._config)

    def check_health(self) -> None:
        """Called by Serve every few seconds. A controller that is away is Ray's to restart; one that is gone for good
        is created anew."""
        try:
            if self._keep():
                self._set_up()
        except LoraplexError as error:
            logger.warning("no controller: %s", error.message)

    def _keep(self) -> bool:
        """Whether it had to be created. Raises Unavailable while it is away."""
        try:
            controller, created = controller_handle(), False
        except Unavailable:
            controller, created = create_controller(_with_database(self._config, self._database_url_file)), True
        _started(controller)
        return created

    def _set_up(self) -> None:
        set_up(RunningPlatform(self._config, controller_handle(), contextlib.ExitStack()), self._config, logger.info)


def _started(controller: Any) -> None:
    try:
        ray.get(controller.start.remote(), timeout=_START_TIMEOUT_S)
    except (ray.exceptions.RayError, TimeoutError) as error:
        raise unwrap(error) from None


def _with_database(config: PlatformConfig, url_file: str | None) -> PlatformConfig:
    if url_file is None:
        return config
    database = msgspec.structs.replace(config.controller.database, url=None, url_file=url_file)
    return msgspec.structs.replace(config, controller=msgspec.structs.replace(config.controller, database=database))


def _await_controller(config: PlatformConfig) -> None:
    deadline_s = time.monotonic() + _CONTROLLER_WAIT_S
    while True:
        record = read_record()
        try:
            if record is not None and not differences(record.config, config):
                _started(controller_handle())
                return
        except Unavailable:
            if time.monotonic() > deadline_s:
                raise
        if time.monotonic() > deadline_s:
            raise Unavailable(f"no controller with this config after {_CONTROLLER_WAIT_S:.0f} s")
        time.sleep(0.2)
