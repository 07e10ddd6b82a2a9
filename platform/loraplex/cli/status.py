"""``loraplex status``."""

from typing import Any

import typer

from loraplex.cli.api import Api
from loraplex.cli.connection import (
    DEFAULT_KEY_FILE,
    JsonOption,
    KeyFileOption,
    KeyOption,
    UrlOption,
    admin_connection,
)
from loraplex.cli.output import print_json, print_table


def status_command(
    url: UrlOption = None,
    key: KeyOption = None,
    demo_file: KeyFileOption = DEFAULT_KEY_FILE,
    as_json: JsonOption = False,
) -> None:
    """What a running platform serves, and from where. Needs an administrator's key."""
    connection = admin_connection(url, key, demo_file)
    status = Api(connection).get("/status")
    if as_json:
        print_json(status)
        return
    typer.echo(f"{connection.url}  base models: {', '.join(status['base_models']) or 'none'}")
    typer.echo(
        f"{status['num_tenants']} tenants, {status['num_adapters']} adapters "
        f"({status['num_adapter_versions']} versions), gateway {status['gateway']}, "
        f"control snapshot {status['epoch']}.{status['version']}"
    )
    if not status["replicas"]:
        typer.echo("no replica is up")
        return
    print_table(
        ["replica", "base model", "address", "connected", "running", "waiting", "free pages", "steps", "tokens"],
        [_replica_row(replica) for replica in status["replicas"]],
    )


def _replica_row(replica: dict[str, Any]) -> list[Any]:
    load = replica.get("load") or {}
    return [
        replica["id"],
        replica["base_model"],
        replica["address"],
        replica["connected"],
        load.get("num_running"),
        load.get("num_waiting"),
        load.get("num_free_pages"),
        load.get("steps"),
        load.get("generated_tokens"),
    ]
