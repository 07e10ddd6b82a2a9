"""``loraplex bench fleet``: a plan on real devices without Ray, beside the simulator. Paths in, lines out."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help="A plan's replicas on real devices, without Ray.")

ResultsArgument = Annotated[Path, typer.Argument(help="JSON file of the measured rows.")]


@app.command("prepare")
def prepare_command(
    experiment: Annotated[Path, typer.Argument(help="JSON file of an experiment, as in notebooks/experiments.")],
    out: Annotated[Path, typer.Argument(help="File for arrivals, plans and predictions.")],
    fields: Annotated[str | None, typer.Option("--set", help="JSON of fields that replace the file's.")] = None,
) -> None:
    """Makes arrivals, plans and predictions; needs no accelerator."""
    from loraplex.bench.fleet.options import read_experiment
    from loraplex.bench.fleet.prepare import prepare

    prepare(read_experiment(experiment, fields), say=typer.echo).write(out)


@app.command("measure")
def measure_command(
    prepared: Annotated[Path, typer.Argument(help="File of `prepare`.")],
    results: ResultsArgument,
    workloads: Annotated[str, typer.Option(help="Names, by commas; default: all.")] = "",
    placements: Annotated[str, typer.Option(help="Names, by commas; default: all.")] = "",
    budget: Annotated[float | None, typer.Option(help="Seconds within which cells must end.")] = None,
    largest_wave: Annotated[int, typer.Option(min=1, help="Requests at once, per replica, of the warm-up.")] = 64,
    waves: Annotated[int, typer.Option(min=1, help="Of each size in the warm-up.")] = 3,
    steps_to: Annotated[Path | None, typer.Option(help="Folder for the steps of each cell.")] = None,
) -> None:
    """Runs what the results do not hold yet, plan by plan; prints measured / predicted."""
    from loraplex.bench.fleet.measure import MeasureOptions, measure
    from loraplex.bench.fleet.prepared import PreparedFleet

    options = MeasureOptions(
        workloads=tuple(filter(None, workloads.split(","))),
        placements=tuple(filter(None, placements.split(","))),
        budget_s=budget,
        largest_wave=largest_wave,
        waves=waves,
        steps_to=None if steps_to is None else str(steps_to),
    )
    table = measure(PreparedFleet.load(prepared), results, options, say=typer.echo)
    if table.left:
        typer.echo(f"left for want of time: {'; '.join(table.left)}")


@app.command("show")
def show_command(
    results: ResultsArgument,
    html: Annotated[Path | None, typer.Option(help="File for a page that needs no network.")] = None,
) -> None:
    """Prints the rows of a results file, measured / predicted, and for each load its plans, the best first."""
    from loraplex.bench.fleet.measure import row_lines
    from loraplex.bench.fleet.page import fleet_page
    from loraplex.bench.fleet.ranking import ranking_lines
    from loraplex.bench.fleet.results import FleetTable

    table = FleetTable.load(results)
    rows = table.rows
    if html is not None:
        html.write_text(fleet_page(table), encoding="utf-8")
    for line in (*(line for row in rows for line in row_lines(row)), *ranking_lines(rows)):
        typer.echo(line)
