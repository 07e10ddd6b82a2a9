"""``loraplex state ...``: the control state as a file. Works on the database itself, where that is reached."""

from pathlib import Path
from typing import Annotated

import typer

from loraplex.cli.output import print_table, shown_time
from loraplex.config.platform import load_platform_config
from loraplex.core.errors import BadConfig
from loraplex.database.backup import back_up
from loraplex.database.backup import restore as restore_state
from loraplex.database.config import DatabaseConfig

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Back up and restore the control state: tenants, keys (hashes), adapters' versions, plans, decisions.",
)

ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="The platform's YAML, whose control database is meant.")
]
DatabaseOption = Annotated[
    str | None,
    typer.Option(
        "--database", metavar="URL", help="This database instead: sqlite:///FILE or postgresql://USER@HOST/NAME."
    ),
]
DatabaseFileOption = Annotated[
    str | None, typer.Option("--database-file", metavar="FILE", help="The database whose URL is in this file.")
]


@app.command("backup")
def backup(
    file: Annotated[Path, typer.Argument(help="The backup, readable by its owner alone: it holds secrets.")],
    config: ConfigOption = None,
    database: DatabaseOption = None,
    database_file: DatabaseFileOption = None,
    replace: Annotated[bool, typer.Option("--replace", help="Write over a FILE that exists.")] = False,
) -> None:
    """Write the control state, as it is at one instant, to FILE. The platform may be running.

    Artifacts and traces are not in it: back up their stores as well, after this.
    """
    wanted, directory = _database(config, database, database_file)
    state = back_up(wanted, directory=directory, file=file, replace=replace)
    print_table(["table", "rows"], [[name, count] for name, count in sorted(state.num_rows.items())])
    typer.echo(f"{file}: schema {state.revision}, epoch {state.epoch}", err=True)


@app.command("restore")
def restore(
    file: Annotated[Path, typer.Argument(help="As written by `backup`, on whatever kind of database.")],
    config: ConfigOption = None,
    database: DatabaseOption = None,
    database_file: DatabaseFileOption = None,
    replace: Annotated[bool, typer.Option("--replace", help="Delete the state that the database holds.")] = False,
) -> None:
    """Fill an empty control database from FILE. Stop the platform before, and start it afterwards."""
    wanted, directory = _database(config, database, database_file)
    restored = restore_state(wanted, directory=directory, file=file, replace=replace)
    state = restored.state
    print_table(["table", "rows"], [[name, count] for name, count in sorted(state.num_rows.items())])
    typer.echo(
        f"{restored.database}: the state of {shown_time(state.created_s)}; controllers count on from epoch "
        f"{restored.epoch}",
        err=True,
    )


def _database(config: Path | None, database: str | None, database_file: str | None) -> tuple[DatabaseConfig, Path]:
    """(settings, directory of the default file)."""
    if sum(one is not None for one in (config, database, database_file)) != 1:
        raise BadConfig("say which database: one of --config, --database and --database-file")
    if config is None:
        return DatabaseConfig(url=database, url_file=database_file), Path()
    platform = load_platform_config(config)
    return platform.controller.database, platform.root
