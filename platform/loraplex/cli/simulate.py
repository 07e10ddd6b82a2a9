"""``loraplex simulate``: a trace through a plan, on a virtual clock."""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from loraplex.cli.connection import JsonOption
from loraplex.cli.output import print_json, print_table, shown, shown_bytes
from loraplex.cli.plan import FleetOption, SloOption, TraceOption, parse_slo, parse_window, read_fleet, read_plan
from loraplex.simulator.cluster import Cluster
from loraplex.simulator.exact import simulate_exact
from loraplex.simulator.fast import simulate
from loraplex.simulator.results import adapter_scores, tenant_scores
from loraplex.simulator.types import Outcome, Score, SimulationInput, SimulationResult
from loraplex.simulator.workload import Workload
from loraplex.traces.arrivals import read_arrivals


def simulate_command(
    plan: Annotated[Path, typer.Option("--plan", help="The plan: groups, shapes, bases, adapter sets.")],
    trace: TraceOption,
    fleet: FleetOption,
    slo: SloOption = "ttft=500ms,tpot=50ms",
    window: Annotated[str | None, typer.Option(help="Only these seconds of the trace, START:END.")] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Run the real scheduler and routing policy: some hundred requests a second.")
    ] = False,
    top: Annotated[int, typer.Option(min=0, help="How many tenants and adapters to show, those served worst.")] = 10,
    as_json: JsonOption = False,
) -> None:
    """Simulate a trace through a plan: attainment, latencies, use of GPUs, adapter loads."""
    given = _input(plan, trace, fleet, slo, window)
    workload = Workload.of(given.arrivals, given.adapters)
    result = (simulate_exact if exact else simulate)(given, workload)
    cluster = Cluster.of(given, workload)
    tenants, adapters = tenant_scores(given, result, cluster), adapter_scores(given, result, cluster)
    outcomes = {outcome.name.lower(): int(np.count_nonzero(result.outcome == outcome)) for outcome in Outcome}
    if as_json:
        figures = {"score": result.score, "outcomes": outcomes, "end_s": result.end_s, "gpu_use": result.gpu_use}
        print_json({**figures, "groups": result.groups, "tenants": tenants, "adapters": adapters})
        return
    _print(result, outcomes)
    for title, scores in (("tenants", tenants), ("adapters", adapters)):
        worst = sorted(scores.items(), key=lambda item: (item[1].attainment, -item[1].num_requests))[:top]
        if worst:
            typer.echo()
            print_table([title, *_COLUMNS], [[name, *_cells(score)] for name, score in worst])


_COLUMNS = ("requests", "attainment", "goodput/s", "TTFT p50 s", "TTFT p99 s", "TPOT p50 s", "TPOT p99 s")


def _input(plan: Path, trace: str, fleet: Path, slo: str, window: str | None) -> SimulationInput:
    layout = read_fleet(fleet)
    planned = layout.fitting(read_plan(plan), where=str(plan))
    arrivals = read_arrivals(trace, None if window is None else parse_window(window))
    bases = dict.fromkeys(placed.base_model_id for group in planned.groups for placed in group.bases)
    return SimulationInput(
        plan=planned,
        arrivals=arrivals,
        adapters=layout.sizes(arrivals.adapters),
        costs=layout.costs(bases),
        slo=parse_slo(slo),
        engine=layout.engine,
    )


def _cells(score: Score) -> list[object]:
    return [
        score.num_requests,
        score.attainment,
        score.goodput_per_s,
        score.ttft_s["p50"],
        score.ttft_s["p99"],
        score.tpot_s["p50"],
        score.tpot_s["p99"],
    ]


def _print(result: SimulationResult, outcomes: dict[str, int]) -> None:
    print_table(["", *_COLUMNS], [["all", *_cells(result.score)]])
    lost = [f"{shown(count)} {name}" for name, count in outcomes.items() if count and name != "served"]
    typer.echo(
        f"{shown(outcomes['served'])} served{''.join(', ' + text for text in lost)}; the last ended at "
        f"{result.end_s:.1f} s; GPUs in steps {result.gpu_use:.1%} of the time"
    )
    typer.echo()
    print_table(
        ["group", "GPUs", "requests", "busy", "steps", "preemptions", "adapter loads", "loaded per GPU"],
        [
            [
                group.name,
                group.num_gpus,
                group.num_requests,
                f"{group.busy_s / result.end_s:.1%}",
                group.num_steps,
                group.num_preemptions,
                group.num_loads,
                shown_bytes(group.load_bytes),
            ]
            for group in result.groups
        ],
    )
