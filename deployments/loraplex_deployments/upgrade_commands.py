"""``loraplex upgrade``: another build or config for a deployed platform, which serves on meanwhile."""

import time
from pathlib import Path
from typing import Annotated

import typer
from loraplex.config.platform import load_platform_config

from loraplex_deployments.cli import console, progress_since, set_up
from loraplex_deployments.deploy_commands import for_cluster
from loraplex_deployments.launch import RunningPlatform, data_dir_lock
from loraplex_deployments.signals import on_signals
from loraplex_deployments.upgrade import upgrade


def upgrade_command(
    config: Annotated[Path, typer.Option("--config", help="The platform's YAML file.")],
    address: Annotated[
        str | None,
        typer.Option("--address", help="Of the Ray cluster: HOST:PORT or `auto`; by default the config's, or `auto`."),
    ] = None,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds to wait for the replicas.")] = 3600.0,
) -> None:
    """Upgrade: replace controller, replicas and gateways of what is deployed, one by one; run it on the head node."""
    given_up = on_signals(lambda: console.print("\ngiving up"))
    settings = for_cluster(load_platform_config(config), address)
    progress = progress_since(time.monotonic())

    def prepare(platform: RunningPlatform) -> None:
        set_up(platform, settings, progress)

    with data_dir_lock(settings.root):
        upgrade(
            settings,
            set_up=prepare,
            progress=progress,
            given_up=given_up.is_set,
            timeout_s=timeout_s,
        )
    progress("upgraded")
