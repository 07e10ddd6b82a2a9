"""``loraplex trace convert``: public traces, and our own, to one of our files."""

from typing import Annotated

import typer

from loraplex.cli.output import print_table, shown
from loraplex.core.errors import BadConfig
from loraplex.traces.arrivals import Window
from loraplex.traces.convert.catalog import FORMATS
from loraplex.traces.convert.convert import ConvertOptions, convert
from loraplex.traces.convert.counts import Spread
from loraplex.traces.convert.mapping import MappingStrategy
from loraplex.traces.synth.lengths import FORMS


def _list_formats(wanted: bool) -> None:
    if wanted:
        rows = [["trace", "our own Parquet files: a file, a folder, a glob or a pyarrow.fs URL", "arrival_s"]]
        rows += [[each.name, each.about, ", ".join(each.required)] for each in FORMATS.values()]
        print_table(["format", "what it is", "columns that tell it"], rows)
        raise typer.Exit


def convert_command(
    source: Annotated[
        str, typer.Argument(help="CSV, JSON lines, npz or Parquet, also compressed or a pyarrow.fs URL.")
    ],
    out: Annotated[str, typer.Option("--out", "-o", help="Parquet file to write, or a pyarrow.fs URL.")],
    format_: Annotated[str | None, typer.Option("--format", help="Default: recognised by its columns.")] = None,
    ignore_column: Annotated[list[str] | None, typer.Option(help="Overlook this column; may be repeated.")] = None,
    exclude_trigger: Annotated[
        list[str] | None,
        typer.Option(help="Leave out Azure functions of this trigger, such as timer; may be repeated."),
    ] = None,
    adapters: Annotated[int | None, typer.Option(help="Let the source's functions stand for so many adapters.")] = None,
    mapping: Annotated[
        MappingStrategy, typer.Option(help="Function i of F is adapter i mod A (stripe) or A * i / F, as AlpaServe.")
    ] = MappingStrategy.STRIPE,
    window: Annotated[str | None, typer.Option(help="START:END seconds of the trace; they become 0:END-START.")] = None,
    spread: Annotated[
        Spread, typer.Option(help="Where counted requests arrive in their interval; fitted needs the source's fits.")
    ] = Spread.UNIFORM,
    cv: Annotated[float, typer.Option(help="Of the gaps of --spread gamma.")] = 1.0,
    count_scale: Annotated[float, typer.Option(help="Multiply the counts of a format of counts.")] = 1.0,
    speed: Annotated[float, typer.Option(help="2: twice as fast as recorded.")] = 1.0,
    base: Annotated[str | None, typer.Option(help="Base model of the rows that name none.")] = None,
    lengths: Annotated[str | None, typer.Option(help=f"For rows that lack a length: {FORMS}.")] = None,
    sort: Annotated[bool, typer.Option("--sort", help="Sort rows that are out of order, on disk.")] = False,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    list_formats: Annotated[
        bool, typer.Option("--formats", is_eager=True, callback=_list_formats, help="List the formats and end.")
    ] = False,
) -> None:
    """Bring a public trace into our Parquet schema; cut, speed up or complete one of ours."""
    options = ConvertOptions(
        format=format_,
        ignore_columns=tuple(ignore_column or ()),
        exclude_triggers=tuple(exclude_trigger or ()),
        adapters=adapters,
        mapping=mapping,
        window=None if window is None else _window(window),
        spread=spread,
        cv=cv,
        count_scale=count_scale,
        speed=speed,
        base_model=base,
        lengths=lengths,
        sort=sort,
        seed=seed,
    )
    result = convert(source, out, options)
    typer.echo(f"{shown(result.rows)} requests in {out}, from format {result.format}")


def _window(text: str) -> Window:
    try:
        start_s, end_s = (float(part) for part in text.split(":"))
    except ValueError as error:
        raise BadConfig(f"--window {text!r}, expected START:END in seconds", param="window") from error
    return Window(start_s, end_s)
