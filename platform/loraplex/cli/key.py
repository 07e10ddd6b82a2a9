"""``loraplex key ...``: for administrators."""

from typing import Annotated
from urllib.parse import quote

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
from loraplex.cli.output import print_json, print_table, shown_time
from loraplex.core.tenant import Role

app = typer.Typer(no_args_is_help=True, add_completion=False, help="API keys of a tenant.")

TenantArgument = Annotated[str, typer.Argument(metavar="TENANT")]


@app.command("create")
def create(
    tenant: TenantArgument,
    role: Annotated[
        Role, typer.Option(help="member generates; tenant_admin also registers adapters; admin manages tenants.")
    ] = Role.MEMBER,
    url: UrlOption = None,
    key: KeyOption = None,
    demo_file: KeyFileOption = DEFAULT_KEY_FILE,
    as_json: JsonOption = False,
) -> None:
    """Create a key. It is shown this once and kept nowhere in clear."""
    created = Api(admin_connection(url, key, demo_file)).post(_path(tenant), json={"role": role.value})
    if as_json:
        print_json(created)
        return
    typer.echo(f"key {created['id']} of tenant {tenant} ({created['role']}); it is shown only now:", err=True)
    typer.echo(created["key"])


@app.command("list")
def list_all(
    tenant: TenantArgument,
    url: UrlOption = None,
    key: KeyOption = None,
    demo_file: KeyFileOption = DEFAULT_KEY_FILE,
    as_json: JsonOption = False,
) -> None:
    """The keys of a tenant, without their secrets."""
    keys = Api(admin_connection(url, key, demo_file)).get(_path(tenant))["data"]
    if as_json:
        print_json(keys)
        return
    print_table(["key id", "role", "created"], [[k["id"], k["role"], shown_time(k.get("created"))] for k in keys])


@app.command("delete")
def delete(
    tenant: TenantArgument,
    key_id: Annotated[str, typer.Argument(help="As listed.")],
    url: UrlOption = None,
    key: KeyOption = None,
    demo_file: KeyFileOption = DEFAULT_KEY_FILE,
) -> None:
    """Delete a key; requests with it are refused from now on."""
    Api(admin_connection(url, key, demo_file)).delete(f"{_path(tenant)}/{quote(key_id, safe='')}")
    typer.echo(f"key {key_id} deleted")


def _path(tenant: str) -> str:
    return f"/tenants/{quote(tenant, safe='')}/keys"
