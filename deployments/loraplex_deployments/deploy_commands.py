"""``loraplex deploy``, ``undeploy``, ``deployed``: a platform on a Ray cluster that goes on when they have ended."""

import time
from pathlib import Path
from typing import Annotated, Any

import msgspec
import ray
import typer
from loraplex.cli.output import print_json, print_table, shown_time
from loraplex.config.platform import PlatformConfig, load_platform_config
from loraplex.core.errors import BadConfig, Unavailable

from loraplex_deployments.cli import console, print_addresses, progress_since, set_up
from loraplex_deployments.cluster_nodes import ClusterNode, cluster_nodes
from loraplex_deployments.deploy import Deployment, deploy, find_deployment, joined, undeploy
from loraplex_deployments.launch import RunningPlatform, data_dir_lock
from loraplex_deployments.signals import on_signals

_Address = Annotated[
    str, typer.Option("--address", help="Of the Ray cluster: HOST:PORT, or `auto` for the one of this machine.")
]


def deploy_command(
    config: Annotated[Path, typer.Option("--config", help="The platform's YAML file.")],
    address: Annotated[
        str | None,
        typer.Option("--address", help="Of the Ray cluster: HOST:PORT or `auto`; by default the config's, or `auto`."),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Take down another config or build that is deployed there.")
    ] = False,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds until it must be ready.")] = 600.0,
) -> None:
    """Deploy: put the platform on a running Ray cluster; run it on the head node. Returns when it serves."""
    given_up = on_signals(lambda: console.print("\ngiving up"))
    settings = for_cluster(load_platform_config(config), address)
    progress = progress_since(time.monotonic())
    demo: dict[str, Any] | None = None
    host = settings.listen.host

    def prepare(platform: RunningPlatform) -> None:
        nonlocal demo, host
        demo = set_up(platform, settings, progress)
        if host == "0.0.0.0":
            host = ray.util.get_node_ip_address()

    with data_dir_lock(settings.root):
        serves = deploy(
            settings,
            set_up=prepare,
            progress=progress,
            given_up=given_up.is_set,
            replace=replace,
            timeout_s=timeout_s,
        )
    if not serves:
        raise Unavailable("given up; nothing is left of it")
    progress("ready")
    print_addresses(settings, demo, host=host)
    console.print("It goes on until `loraplex undeploy`.")


def undeploy_command(address: _Address = "auto") -> None:
    """Undeploy: take off a Ray cluster what `deploy` put there; data stays."""
    removed = undeploy(address, progress_since(time.monotonic()))
    console.print("removed" if removed else "nothing is deployed there")


def deployed_command(
    address: _Address = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """What is deployed on a Ray cluster, and which nodes it has. Exit code 1 when that is nothing or broken."""
    with joined(address):
        nodes, found = cluster_nodes(), find_deployment()
    if as_json:
        print_json({"nodes": nodes, "deployed": None if found is None else msgspec.to_builtins(found)})
    else:
        _print_nodes(nodes)
        _print_deployment(found)
    if found is None or not (found.controller_answers and found.gateways_run) or found.replica_failures:
        raise typer.Exit(1)


def for_cluster(config: PlatformConfig, address: str | None) -> PlatformConfig:
    """With the address of a cluster and a data directory that means the same to all processes. Raises BadConfig."""
    if address is None:
        address = "auto" if config.ray.address == "local" else config.ray.address
    if address == "local" or address.startswith("ray://"):
        raise BadConfig(
            f"--address {address}: HOST:PORT of a running cluster, or `auto`, on its head node", param="address"
        )
    return msgspec.structs.replace(
        config,
        ray=msgspec.structs.replace(config.ray, address=address),
        data_dir=str(Path(config.data_dir).expanduser().absolute()),
    )


def _print_nodes(nodes: tuple[ClusterNode, ...]) -> None:
    print_table(
        ("node", "CPUs", "GPUs", "GPU type", ""),
        [(n.address, n.num_cpus, n.num_gpus, n.gpu_type, "head" if n.is_head else "") for n in nodes],
    )


def _print_deployment(found: Deployment | None) -> None:
    if found is None:
        console.print("\nnothing is deployed")
        return
    deployed = found.deployed
    console.print(f"\nloraplex {deployed.build}, since {shown_time(deployed.unix_s)}")
    console.print(f"data in {deployed.config.data_dir}")
    for base in deployed.config.base_models:
        console.print(f"base {base.id}: {base.replicas} x {base.model}")
    console.print(f"controller: {'answers' if found.controller_answers else 'does not answer'}")
    console.print(f"gateways: {'run' if found.gateways_run else 'do not run'}")
    for name, reason in found.replica_failures.items():
        console.print(f"replica {name} is down: {reason}")
