"""Starts and stops Serve and the gateway application in it. Called by the launcher, which imports this module only once
``ServeProxy`` has set what Serve reads at its import.
"""

import contextlib
import logging
import math
import time

import ray
from loraplex.config.platform import PlatformConfig
from ray import serve
from ray.serve._private import constants
from ray.serve.config import HTTPOptions, ProxyLocation, gRPCOptions
from ray.serve.schema import ApplicationStatus, LoggingConfig

from loraplex_deployments.gateway_app import APP_NAME, GRPC_SERVICERS, MAX_REFUSALS, GatewayDeployment
from loraplex_deployments.proxy import ServeProxy

_STOP_TIMEOUT_S = 20.0
_POLL_S = 0.2
_QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)


def start_gateways(config: PlatformConfig, proxy: ServeProxy) -> None:
    """Starts Serve, or joins the cluster's, and deploys the gateways; returns when they answer."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    local = config.ray.address == "local"
    serve.start(
        proxy_location=(ProxyLocation.HeadOnly if local or config.ray.single_machine else ProxyLocation.EveryNode),
        http_options=HTTPOptions(host=config.listen.host, port=config.listen.http_port),
        grpc_options=gRPCOptions(port=config.listen.grpc_port, grpc_servicer_functions=list(GRPC_SERVICERS)),
        logging_config=_QUIET,
        # A local Ray has them from us; on a cluster the first start of Serve takes them along, to its proxies as well.
        controller_options=None if local else {"runtime_env": {"env_vars": dict(proxy.variables)}},
    )
    deploy_gateways(config)


def deploy_gateways(config: PlatformConfig) -> None:
    """Into a Serve that runs. Those that are there already are replaced one by one, whatever has changed. Returns when
    the new ones answer, while old ones may still have requests to end."""
    serve.run(gateway_application(config), name=APP_NAME, route_prefix="/")


def gateway_application(config: PlatformConfig) -> serve.Application:
    """The gateways as Serve deploys them."""
    deployment = GatewayDeployment.options(  # type: ignore[attr-defined]
        num_replicas=config.serve.gateways,
        max_ongoing_requests=config.serve.max_ongoing_requests + MAX_REFUSALS,
        ray_actor_options={"num_cpus": config.serve.gateway_num_cpus, "resources": config.serve.gateway_resources},
        # An upgrade replaces them one by one: the next one is there before one goes, which lets its requests end.
        max_surge_percent=_surge_percent(config),
        graceful_shutdown_timeout_s=config.serve.drain_timeout_s,
        logging_config=_QUIET,
    )
    return deployment.bind(config)


def _surge_percent(config: PlatformConfig) -> int:
    """For one more, unless a gateway takes all that its node has of something."""
    whole = any(amount >= 1 for amount in config.serve.gateway_resources.values())
    return 0 if whole else math.ceil(100 / config.serve.gateways)


def runs_haproxy() -> bool:
    """Whether the Serve of this cluster uses HAProxy, as its own controller has it."""
    controller = ray.get_actor(constants.SERVE_CONTROLLER_NAME, namespace=constants.SERVE_NAMESPACE)
    return bool(ray.get(controller.__ray_call__.remote(_read_switch)))


def _read_switch(_controller: object) -> bool:
    return bool(constants.RAY_SERVE_ENABLE_HA_PROXY)


def serve_runs() -> bool:
    """Whether there is a Serve on this cluster."""
    try:
        ray.get_actor(constants.SERVE_CONTROLLER_NAME, namespace=constants.SERVE_NAMESPACE)
    except ValueError:
        return False
    return True


def gateways_run() -> bool:
    """Whether Serve runs our application and holds it for sound."""
    if not serve_runs():
        return False
    application = serve.status().applications.get(APP_NAME)
    return application is not None and application.status == ApplicationStatus.RUNNING


def stop_gateways(*, whole_serve: bool) -> None:
    """Ends the gateways, which send their last trace rows; with ``whole_serve`` Serve and its proxies as well, unless
    somebody else has an application there by now. Requests that are open have some seconds. Nothing happens where
    Serve does not run."""
    if not serve_runs():
        return
    serve.delete(APP_NAME, _blocking=False)
    deadline_s = time.monotonic() + _STOP_TIMEOUT_S
    while APP_NAME in serve.status().applications:
        if time.monotonic() > deadline_s:
            _kill_gateways()
        time.sleep(_POLL_S)
    if whole_serve and not serve.status().applications:
        serve.shutdown()


def _kill_gateways() -> None:
    prefix = f"SERVE_REPLICA::{APP_NAME}#"
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == constants.SERVE_NAMESPACE and actor["name"].startswith(prefix):
            with contextlib.suppress(ValueError, ray.exceptions.RayError):
                ray.kill(ray.get_actor(actor["name"], namespace=constants.SERVE_NAMESPACE))
