"""``loraplex config``: check a platform file, explain its keys, print its JSON schema. Needs no running platform."""

from pathlib import Path
from typing import Annotated

import typer

from loraplex.cli.connection import JsonOption
from loraplex.cli.output import print_json, print_table
from loraplex.config.advice import notes, warnings
from loraplex.config.keys import keys
from loraplex.config.platform import read_config, read_text
from loraplex.config.schema import platform_schema
from loraplex.core.errors import NotFound

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Check, explain and describe the platform's file.")

_WRONG = 2


@app.command("check")
def check(
    file: Annotated[Path, typer.Argument(help="The platform's YAML file.")],
    as_json: JsonOption = False,
) -> None:
    """One line for each problem, with its path; then warnings, and where data will lie. Exit code 2 with a problem."""
    config, problems = read_config(read_text(file))
    warned = () if config is None else tuple(warnings(config))
    noted = () if config is None else tuple(notes(config))
    if as_json:
        rows = {
            name: [{"path": one.path, "what": one.what} for one in found]
            for name, found in (("problems", problems), ("warnings", warned))
        }
        print_json({**rows, "notes": noted})
    else:
        for problem in problems:
            typer.echo(f"{file}: {problem}")
        for problem in warned:
            typer.echo(f"{file}: warning: {problem}")
        for note in noted:
            typer.echo(note)
        if not problems:
            typer.echo("no problems")
    if problems:
        raise typer.Exit(_WRONG)


@app.command("explain")
def explain(
    path: Annotated[str, typer.Argument(help="A key or section, e.g. router or base_models.engine; all without.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Type, default, unit and meaning of every key."""
    found = keys(path)
    if not found:
        raise NotFound(f"there is no key {path!r} (loraplex config explain lists all)", param="path")
    if as_json:
        print_json(found)
        return
    if len(found) > 1:
        print_table(
            ("key", "type", "default", "unit", "meaning"),
            [(key.path, key.type, key.default or "required", key.unit, _short(key.doc)) for key in found],
        )
        return
    (key,) = found
    typer.echo(f"{key.path}: {' '.join(filter(None, (key.type, key.unit and f'({key.unit})')))}")
    typer.echo(f"default: {key.default or 'none, must be given'}")
    if key.doc:
        typer.echo(key.doc)


@app.command("schema")
def schema() -> None:
    """The JSON schema of the file, for editors and CI."""
    print_json(platform_schema())


def _short(doc: str) -> str:
    """Its first sentence."""
    first, stop, _ = doc.partition(". ")
    return first + stop.strip()
