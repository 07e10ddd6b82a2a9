"""``loraplex adapter ...``: for a tenant, or an administrator with ``--tenant``."""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from loraplex.cli.api import Api
from loraplex.cli.connection import (
    DEFAULT_KEY_FILE,
    JsonOption,
    KeyFileOption,
    KeyOption,
    TenantOption,
    UrlOption,
    tenant_connection,
)
from loraplex.cli.output import print_json, print_table, shown_bytes, shown_time
from loraplex.core.errors import BadConfig

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Register, list, roll back and delete adapters.")

NameArgument = Annotated[str, typer.Argument(metavar="ADAPTER")]
_FILES = ("adapter_config.json", "adapter_model.safetensors")


@app.command("register")
def register(
    name: NameArgument,
    directory: Annotated[
        Path | None, typer.Argument(help="PEFT directory with adapter_config.json and adapter_model.safetensors.")
    ] = None,
    from_url: Annotated[
        str | None,
        typer.Option("--from-url", help="Instead: a directory that the server reads; approved by the admin."),
    ] = None,
    tenant: TenantOption = None,
    url: UrlOption = None,
    key: KeyOption = None,
    demo_file: KeyFileOption = DEFAULT_KEY_FILE,
    as_json: JsonOption = False,
) -> None:
    """Register an adapter, or a new version of one; the new version is used at once."""
    if (directory is None) == (from_url is None):
        raise BadConfig("give a directory or --from-url, one of them")
    api = Api(tenant_connection(url, key, demo_file, tenant))
    if directory is None:
        _show(api.post("/adapters", json={"name": name, "url": from_url}), as_json)
        return
    with ExitStack() as stack:
        files = {}
        for filename in _FILES:
            path = directory / filename
            if not path.is_file():
                raise BadConfig(f"no file {path}")
            files[filename] = (filename, stack.enter_context(path.open("rb")), "application/octet-stream")
        _show(api.post("/adapters", data={"name": name}, files=files), as_json)


@app.command("list")
def list_all(
    tenant: TenantOption = None,
    url: UrlOption = None,
    key: KeyOption = None,
    demo_file: KeyFileOption = DEFAULT_KEY_FILE,
    as_json: JsonOption = False,
) -> None:
    """The adapters of the tenant."""
    _list(Api(tenant_connection(url, key, demo_file, tenant)).get("/adapters")["data"], as_json)


@app.command("show")
def show(
    name: NameArgument,
    tenant: TenantOption = None,
    url: UrlOption = None,
    key: KeyOption = None,
    demo_file: KeyFileOption = DEFAULT_KEY_FILE,
    as_json: JsonOption = False,
) -> None:
    """All versions of one adapter."""
    _list(Api(tenant_connection(url, key, demo_file, tenant)).get(_path(name))["data"], as_json)


@app.command("rollback")
def rollback(
    name: NameArgument,
    version: Annotated[int, typer.Argument(min=1, help="The version to use from now on.")],
    tenant: TenantOption = None,
    url: UrlOption = None,
    key: KeyOption = None,
    demo_file: KeyFileOption = DEFAULT_KEY_FILE,
    as_json: JsonOption = False,
) -> None:
    """Use another version, older or newer."""
    api = Api(tenant_connection(url, key, demo_file, tenant))
    _show(api.post(f"{_path(name)}/rollback", json={"version": version}), as_json)


@app.command("delete")
def delete(
    name: NameArgument,
    version: Annotated[int | None, typer.Option(min=1, help="Only this version.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    tenant: TenantOption = None,
    url: UrlOption = None,
    key: KeyOption = None,
    demo_file: KeyFileOption = DEFAULT_KEY_FILE,
) -> None:
    """Delete an adapter, or one version of it."""
    connection = tenant_connection(url, key, demo_file, tenant)
    what = f"adapter {name}" if version is None else f"version {version} of adapter {name}"
    if not yes:
        typer.confirm(f"Delete {what}?", abort=True)
    Api(connection).delete(_path(name), params={} if version is None else {"version": version})
    typer.echo(f"{what} deleted")


def _path(name: str) -> str:
    return f"/adapters/{quote(name, safe='')}"


def _show(adapter: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(adapter)
    else:
        typer.echo(
            f"adapter {adapter['name']} version {adapter['version']} on {adapter['base_model']}: "
            f"rank {adapter['lora_rank']}, {shown_bytes(adapter['bytes'])}, digest {adapter['digest'][:12]}"
            f"{', current' if adapter['current'] else ''}"
        )


def _list(adapters: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json(adapters)
        return
    print_table(
        ["adapter", "version", "current", "base model", "rank", "size", "created", "digest"],
        [
            [
                adapter["name"],
                adapter["version"],
                adapter["current"],
                adapter["base_model"],
                adapter["lora_rank"],
                shown_bytes(adapter["bytes"]),
                shown_time(adapter["created"]),
                adapter["digest"][:12],
            ]
            for adapter in adapters
        ],
    )
