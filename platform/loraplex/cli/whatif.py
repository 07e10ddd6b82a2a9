"""``loraplex whatif``: attainment with more GPUs, another rate, burstiness or SLO, each point planned anew."""

import sys
from typing import Annotated

import typer

from loraplex.cli.connection import JsonOption
from loraplex.cli.output import print_json, print_table
from loraplex.cli.plan import FleetOption, SeedOption, SloOption, TraceOption, read_problem
from loraplex.core.errors import BadConfig
from loraplex.planner.whatif import Knob, Point, curve


def whatif_command(
    trace: TraceOption,
    fleet: FleetOption,
    vary: Annotated[Knob, typer.Option(help="What changes: a factor of it, but cv, which is the new value.")],
    values: Annotated[str, typer.Option(help="With commas between, e.g. 0.5,1,2.")],
    slo: SloOption = "ttft=500ms,tpot=50ms",
    budget: Annotated[int, typer.Option(min=1, help="Plans to score for each point.")] = 100,
    seed: SeedOption = 0,
    compare: Annotated[bool, typer.Option(help="Also what others do.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Attainment under other circumstances: gpus, rate, cv or slo."""
    try:
        wanted = [float(value) for value in values.split(",")]
    except ValueError as error:
        raise BadConfig(f"values {values!r} are not numbers with commas between", param="values") from error
    problem = read_problem(trace, fleet, slo)
    points: list[Point] = []
    for value in wanted:
        points += curve(problem, vary, [value], evaluations=budget, seed=seed, with_baselines=compare)
        if sys.stderr.isatty():
            print(f"{vary.value} {value:g}: {points[-1].attainment['loraplex']:.4f}", file=sys.stderr)
    if as_json:
        print_json([{"vary": vary.value, "value": p.value, "gpus": p.num_gpus, **p.attainment} for p in points])
        return
    policies = list(points[0].attainment)
    print_table(
        [vary.value, "GPUs", *policies],
        [[point.value, point.num_gpus, *(point.attainment.get(name) for name in policies)] for point in points],
    )
