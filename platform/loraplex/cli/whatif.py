"""``loraplex whatif``: attainment with more GPUs, another rate, burstiness or SLO, each point planned anew."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from loraplex.cli.connection import JsonOption
from loraplex.cli.output import print_json, print_table
from loraplex.cli.plan import FleetOption, SeedOption, SloOption, TraceOption, check_output, read_fleet, read_problem
from loraplex.core.errors import BadConfig
from loraplex.pages.png import png, standalone
from loraplex.planner.whatif import Knob, Point, curve
from loraplex.planner.whatif_plot import whatif_chart


def whatif_command(
    trace: TraceOption,
    fleet: FleetOption,
    vary: Annotated[Knob, typer.Option(help="What changes: a factor of it, but cv, which is the new value.")],
    values: Annotated[str, typer.Option(help="With commas between, e.g. 0.5,1,2.")],
    slo: SloOption = "ttft=500ms,tpot=50ms",
    budget: Annotated[int, typer.Option(min=1, help="Plans to score for each point.")] = 100,
    seed: SeedOption = 0,
    compare: Annotated[bool, typer.Option(help="Also what others do.")] = True,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File for the curves: .svg, .png, or .json for the numbers.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Attainment under other circumstances: gpus, rate, cv or slo."""
    check_output(out, "out", (".svg", ".png", ".json"))
    problem = read_problem(trace, read_fleet(fleet), slo)
    points = curve(
        problem,
        vary,
        _numbers(values),
        evaluations=budget,
        seed=seed,
        with_baselines=compare,
        progress=_progress if sys.stderr.isatty() else lambda point: None,
    )
    figures = [{"vary": vary.value, "value": p.value, "gpus": p.num_gpus, **p.attainment} for p in points]
    if out is not None:
        _write(out, points, figures, heading=f"{Path(trace).name}: {slo}")
    if as_json:
        print_json(figures)
        return
    policies = list(points[0].attainment)
    print_table(
        [vary.value, "GPUs", *policies],
        [[point.value, point.num_gpus, *(point.attainment.get(name) for name in policies)] for point in points],
    )


def _numbers(text: str) -> list[float]:
    try:
        return [float(value) for value in text.split(",")]
    except ValueError as error:
        raise BadConfig(f"values {text!r} are not numbers with commas between", param="values") from error


def _progress(point: Point) -> None:
    print(f"{point.knob.value} {point.value:g}: {point.attainment['loraplex']:.4f}", file=sys.stderr)


def _write(out: Path, points: Sequence[Point], figures: Sequence[Mapping[str, object]], *, heading: str) -> None:
    if out.suffix == ".json":
        out.write_text(json.dumps(figures, indent=2), encoding="utf-8")
        return
    picture = whatif_chart(points, heading=heading)
    if out.suffix == ".png":
        out.write_bytes(png(picture))
    else:
        out.write_text(standalone(picture), encoding="utf-8")
