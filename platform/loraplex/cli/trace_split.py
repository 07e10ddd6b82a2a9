"""``loraplex trace split``: one trace into several files."""

from pathlib import Path
from typing import Annotated

import typer

from loraplex.cli.connection import JsonOption
from loraplex.cli.output import print_json, print_table
from loraplex.core.errors import BadConfig
from loraplex.traces.split import split_tenants, split_train_test, split_windows


def split_command(
    path: Annotated[str, typer.Argument(help="A trace file, a folder of them, a glob or a pyarrow.fs URL.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the files; made if it is not there.")],
    window: Annotated[float | None, typer.Option(help="One file for every WINDOW seconds.")] = None,
    train: Annotated[
        float | None,
        typer.Option(help="The first TRAIN (0 to 1) of the time as train.parquet, the rest as test.parquet."),
    ] = None,
    by_tenant: Annotated[bool, typer.Option("--by-tenant", help="One file for each tenant.")] = False,
    tenant: Annotated[list[str] | None, typer.Option(help="Only this tenant's file; may be repeated.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Cut a trace by time, into a part to plan on and one to score on, or by tenant."""
    tenants = by_tenant or bool(tenant)
    if (window is not None) + (train is not None) + tenants != 1:
        raise BadConfig("give one of --window, --train, --by-tenant (or --tenant)")
    out.mkdir(parents=True, exist_ok=True)
    if window is not None:
        made = split_windows(path, out, every_s=window)
    elif train is not None:
        made = split_train_test(path, out, train=train)
    else:
        made = split_tenants(path, out, only=tenant or ())
    if as_json:
        print_json([{"path": file.path, "rows": file.rows, "start_s": file.start_s} for file in made])
        return
    print_table(["file", "requests", "from second"], [[file.path, file.rows, file.start_s] for file in made])
