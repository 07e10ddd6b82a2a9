"""``loraplex tenant ...``: for administrators."""

from typing import Annotated, Any
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
from loraplex.cli.output import print_json, print_table, shown, shown_bytes
from loraplex.core.errors import BadConfig
from loraplex.core.tenant import LIMIT_NAMES

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Create, change and delete tenants; see their usage."
)

NameArgument = Annotated[str, typer.Argument(metavar="TENANT")]
LimitOption = Annotated[
    list[str] | None,
    typer.Option(
        "--limit",
        metavar="NAME=NUMBER",
        help="requests_per_minute, tokens_per_minute, max_concurrent_requests, max_adapters, max_adapter_bytes, or "
        "weight: its part beside other tenants', 1 by default; 'none' lifts it. May be repeated.",
    ),
]


@app.command("create")
def create(
    name: NameArgument,
    limit: LimitOption = None,
    url: UrlOption = None,
    key: KeyOption = None,
    demo_file: KeyFileOption = DEFAULT_KEY_FILE,
    as_json: JsonOption = False,
) -> None:
    """Create a tenant. It can do nothing before it has a key: see `loraplex key create`."""
    api = Api(admin_connection(url, key, demo_file))
    _show(api.post("/tenants", json={"name": name, "limits": _limits(limit)}), as_json)


@app.command("list")
def list_all(
    url: UrlOption = None,
    key: KeyOption = None,
    demo_file: KeyFileOption = DEFAULT_KEY_FILE,
    as_json: JsonOption = False,
) -> None:
    """All tenants."""
    tenants = Api(admin_connection(url, key, demo_file)).get("/tenants")["data"]
    if as_json:
        print_json(tenants)
        return
    print_table(
        ["tenant", "adapters", "adapter bytes", *(name.replace("_", " ") for name in LIMIT_NAMES)],
        [
            [
                tenant["name"],
                tenant.get("num_adapters"),
                shown_bytes(tenant.get("adapter_bytes")),
                *(tenant["limits"].get(name) for name in LIMIT_NAMES),
            ]
            for tenant in tenants
        ],
    )


@app.command("show")
def show(
    name: NameArgument,
    url: UrlOption = None,
    key: KeyOption = None,
    demo_file: KeyFileOption = DEFAULT_KEY_FILE,
    as_json: JsonOption = False,
) -> None:
    """One tenant and its limits."""
    _show(Api(admin_connection(url, key, demo_file)).get(_path(name)), as_json)


@app.command("update")
def update(
    name: NameArgument,
    limit: LimitOption = None,
    url: UrlOption = None,
    key: KeyOption = None,
    demo_file: KeyFileOption = DEFAULT_KEY_FILE,
    as_json: JsonOption = False,
) -> None:
    """Change limits; those that are not named stay."""
    limits = _limits(limit)
    if not limits:
        raise BadConfig("nothing to change: give at least one --limit NAME=NUMBER")
    _show(Api(admin_connection(url, key, demo_file)).patch(_path(name), json={"limits": limits}), as_json)


@app.command("delete")
def delete(
    name: NameArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    url: UrlOption = None,
    key: KeyOption = None,
    demo_file: KeyFileOption = DEFAULT_KEY_FILE,
) -> None:
    """Delete a tenant with its keys and adapters."""
    connection = admin_connection(url, key, demo_file)
    if not yes:
        typer.confirm(f"Delete tenant {name} with its keys and adapters?", abort=True)
    Api(connection).delete(_path(name))
    typer.echo(f"tenant {name} deleted")


@app.command("usage")
def usage(
    name: NameArgument,
    url: UrlOption = None,
    key: KeyOption = None,
    demo_file: KeyFileOption = DEFAULT_KEY_FILE,
    as_json: JsonOption = False,
) -> None:
    """Requests and tokens of a tenant so far."""
    found = Api(admin_connection(url, key, demo_file)).get(f"{_path(name)}/usage")
    if as_json:
        print_json(found)
        return
    for field in ("requests", "prompt_tokens", "output_tokens"):
        typer.echo(f"{field.replace('_', ' ')}: {shown(found[field])}")


def _path(name: str) -> str:
    return f"/tenants/{quote(name, safe='')}"


def _show(tenant: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(tenant)
        return
    typer.echo(f"tenant {tenant['name']}")
    for name in LIMIT_NAMES:
        limit = tenant["limits"].get(name)
        without = "1" if name == "weight" else "unlimited"
        typer.echo(f"  {name}: {without if limit is None else shown(limit)}")


def _limits(options: list[str] | None) -> dict[str, int | None]:
    limits: dict[str, int | None] = {}
    for option in options or []:
        name, _, number = option.partition("=")
        if name not in LIMIT_NAMES:
            raise BadConfig(f"--limit {option}: there is {', '.join(LIMIT_NAMES)}")
        if number != "none" and not (number.isascii() and number.isdigit()):
            raise BadConfig(f"--limit {option}: not a number")
        limits[name] = None if number == "none" else int(number)
    return limits
