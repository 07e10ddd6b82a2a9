"""Which server, with which key: options first, then the environment, then the demo's key file.

Owns that order and the options that all commands share; called by every command that talks to a server.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer

from loraplex.core.errors import BadConfig, NotFound
from loraplex.loadgen.targets import KeyFile, Target, read_key_file, targets_of

DEFAULT_KEY_FILE = Path(".loraplex/demo.json")

UrlOption = Annotated[
    str | None,
    typer.Option("--url", envvar="LORAPLEX_URL", help="Base URL of the server, such as http://127.0.0.1:8000."),
]
KeyOption = Annotated[str | None, typer.Option("--key", envvar="LORAPLEX_API_KEY", help="API key.")]
KeyFileOption = Annotated[
    Path,
    typer.Option("--demo-file", help="Where addresses and keys come from when --url or --key is not given."),
]
TenantOption = Annotated[
    str | None,
    typer.Option("--tenant", help="Whose; needed with an administrator's key. Default: the key's tenant."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """``prefix``: put before ``/v1``; ``/t/TENANT`` when the tenant is named."""

    url: str
    key: str | None
    prefix: str = ""


def admin_connection(url: str | None, key: str | None, key_file: Path) -> Connection:
    """For what only administrators may do. Raises BadConfig when there is no address or key to be found."""
    if url is not None and key is not None:
        return Connection(url=url, key=key)
    found = _read(key_file)
    key = key or found.admin_key
    if key is None:
        raise BadConfig(f"no administrator's key: {key_file} has no admin_key; give --key or LORAPLEX_API_KEY")
    return Connection(url=url or found.http, key=key)


def tenant_connection(url: str | None, key: str | None, key_file: Path, tenant: str | None) -> Connection:
    """For what a tenant does. A key that is given decides; from the key file the tenant's own key is taken (the first
    tenant's without ``tenant``), or the administrator's for a tenant that the file does not know.

    Raises BadConfig when there is no address or key to be found.
    """
    prefix = "" if tenant is None else f"/t/{quote(tenant, safe='')}"
    if url is not None and key is not None:
        return Connection(url=url, key=key, prefix=prefix)
    found = _read(key_file)
    url = url or found.http
    if key is not None:
        return Connection(url=url, key=key, prefix=prefix)
    for entry in found.tenants:
        if tenant in (None, entry.name):
            return Connection(url=url, key=entry.key, prefix=prefix)
    if tenant is not None and found.admin_key is not None:
        return Connection(url=url, key=found.admin_key, prefix=prefix)
    raise BadConfig(f"no key for {tenant or 'any tenant'} in {key_file}; give --key or LORAPLEX_API_KEY")


def load_targets(
    url: str | None, key: str | None, key_file: Path, models: Sequence[str]
) -> tuple[str, tuple[Target, ...]]:
    """(base URL, who asks for what) of a load run. With a key: the models named, as one tenant; without: all that the
    key file lists, or those of them that are named. Raises BadConfig when nothing is left."""
    if key is not None:
        if not models:
            raise BadConfig("--key without --model: name at least one model")
        targets = tuple(Target(tenant="default", model=model, key=key) for model in models)
        return url if url is not None else _read(key_file).http, targets
    found = _read(key_file)
    targets = tuple(target for target in targets_of(found) if not models or target.model in models)
    if not targets:
        raise BadConfig(f"{key_file} lists no tenant with {' or '.join(models) or 'a model'}")
    return url or found.http, targets


def _read(path: Path) -> KeyFile:
    try:
        return read_key_file(path)
    except NotFound as error:
        raise BadConfig(
            f"no server given and no {path}: use --url and --key, LORAPLEX_URL and LORAPLEX_API_KEY, or start one"
            " with `make serve`"
        ) from error
