"""``loraplex plan``: from a trace, a fleet and targets to a plan. Works on files alone."""

import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import msgspec
import typer

from loraplex.cli.connection import JsonOption
from loraplex.cli.output import json_value, print_json, print_table
from loraplex.core.errors import BadConfig, NotFound
from loraplex.core.plan import Plan
from loraplex.planner.baselines import baselines
from loraplex.planner.fleet import Fleet
from loraplex.planner.problem import Problem
from loraplex.planner.report import RATE_FACTORS, PlanReport, render, reported
from loraplex.planner.sample import on_tables_of
from loraplex.planner.search import Search
from loraplex.simulator.types import Slo
from loraplex.traces.arrivals import Window, read_arrivals

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Plan groups, layouts and adapter sets from a trace."
)

TraceOption = Annotated[
    str, typer.Option("--trace", help="A trace file, a folder of them, a glob or a pyarrow.fs URL.")
]
FleetOption = Annotated[Path, typer.Option("--fleet", help="Fleet file: nodes, cost profiles, adapter ranks.")]
SloOption = Annotated[str, typer.Option("--slo", help='Targets, e.g. "ttft=500ms,tpot=50ms".')]
BudgetOption = Annotated[
    str,
    typer.Option("--budget", help="Plans to score (400), or a time (30s): the same sequence, cut off by the clock."),
]
SeedOption = Annotated[int, typer.Option(min=0, help="Of the search.")]


@app.callback(invoke_without_command=True)
def plan(
    context: typer.Context,
    trace: Annotated[
        str | None, typer.Option("--trace", help="A trace file, a folder, a glob or a pyarrow.fs URL.")
    ] = None,
    fleet: Annotated[Path | None, typer.Option("--fleet", help="Fleet file: nodes, profiles, adapter ranks.")] = None,
    slo: SloOption = "ttft=500ms,tpot=50ms",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File for the plan, YAML.")] = None,
    report: Annotated[
        Path | None, typer.Option(help="File for the report: .html, a page that needs no network, or .json.")
    ] = None,
    budget: BudgetOption = "400",
    seed: SeedOption = 0,
    current: Annotated[
        Path | None, typer.Option(help="The plan that runs: moves are charged, small gains refused.")
    ] = None,
    window: Annotated[str | None, typer.Option(help="Plan on these seconds of the trace, START:END.")] = None,
    score_window: Annotated[str | None, typer.Option(help="Score on these seconds instead, START:END.")] = None,
    tenant_floor: Annotated[
        float, typer.Option(min=0, max=1, help="Attainment that no tenant should fall under.")
    ] = 0.0,
    compare: Annotated[bool, typer.Option(help="Also tune and score what others do.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Plan groups, layouts and adapter sets from a trace."""
    if context.invoked_subcommand is not None:
        return
    if trace is None or fleet is None:
        raise BadConfig("plan needs --trace and --fleet (or a command, as `plan status`)")
    for file, option, endings in ((out, "out", (".yaml", ".yml")), (report, "report", (".html", ".json"))):
        check_output(file, option, endings)
    layout = read_fleet(fleet)
    before = None if current is None else layout.fitting(read_plan(current), where=str(current))
    problem = read_problem(trace, layout, slo, window=window, tenant_floor=tenant_floor, current=before)
    scored_on = None
    if score_window is not None:
        scored_on = on_tables_of(problem.arrivals, read_arrivals(trace, parse_window(score_window)))
    evaluations, seconds = parse_budget(budget)
    compile_s = _compiled(problem)
    started_s = time.perf_counter()
    with _interrupts() as interrupted:
        found = Search(
            problem,
            evaluations=evaluations,
            seed=seed,
            current=before,
            out_of_time=interrupted,
            time_used=lambda: (time.perf_counter() - started_s) / seconds,
            progress=_progress,
        ).run()
    took_s = time.perf_counter() - started_s
    _show("scoring what others do" if compare else "")
    layout.fitting(found.plan, where="the plan found")
    made = reported(
        problem,
        found,
        baselines(problem, seed=seed) if compare else (),
        scored_on,
        rate_factors=RATE_FACTORS if report is not None or as_json else (),
    )
    _show("")
    if out is not None:
        out.write_bytes(msgspec.yaml.encode(found.plan))
    figures = {"took_s": took_s, "compile_s": compile_s, **json_value(made)}
    if report is not None and report.suffix == ".json":
        report.write_text(json.dumps(figures), encoding="utf-8")
    elif report is not None:
        given = {
            "trace": trace if window is None else f"{trace}, seconds {window}",
            "scored on": "the same" if score_window is None else f"seconds {score_window}",
            "fleet": f"{fleet}: {', '.join(f'{node.count} x {node.gpus} {node.gpu}' for node in layout.nodes)}",
            "targets": slo,
            "search": f"--budget {found.evaluations} --seed {seed}: {took_s:.1f} s",
        }
        report.write_text(render(made, title=f"Plan for {Path(trace).name}", given=given), encoding="utf-8")
    if as_json:
        print_json(figures)
        return
    _print(made, took_s)


def check_output(path: Path | None, option: str, endings: tuple[str, ...]) -> None:
    """Before work is spent on what cannot be written."""
    if path is None:
        return
    if path.suffix not in endings:
        raise BadConfig(f"--{option} {path}: its ending is not {' or '.join(endings)}", param=option)
    if not path.absolute().parent.is_dir():
        raise NotFound(f"--{option} {path}: no directory {path.absolute().parent}", param=option)


def read_problem(
    trace: str,
    layout: Fleet,
    slo: str,
    *,
    window: str | None = None,
    tenant_floor: float = 0.0,
    current: Plan | None = None,
) -> Problem:
    """Errors name the file and key, or the row of the trace. ``current``: may hold bases that nobody asks for now."""
    arrivals = read_arrivals(trace, None if window is None else parse_window(window))
    named = [*arrivals.base_models, *(a.base_model for a in arrivals.adapters if a.base_model)]
    named += [] if current is None else bases_of(current)
    return Problem(
        nodes=layout.all_nodes(),
        arrivals=arrivals,
        adapters=layout.sizes(arrivals.adapters),
        costs=layout.costs(dict.fromkeys(named)),
        slo=parse_slo(slo),
        engine=layout.engine,
        tenant_floor=tenant_floor,
        turn_s=layout.turn_s,
    )


def bases_of(plan: Plan) -> list[str]:
    """As often as the plan places them."""
    return [placed.base_model_id for group in plan.groups for placed in group.bases]


def read_fleet(path: Path) -> Fleet:
    try:
        return Fleet.parse(path.read_bytes(), where=str(path))
    except OSError as error:
        raise NotFound(f"cannot read {path}: {error.strerror}", param="fleet") from error


def read_plan(path: Path) -> Plan:
    try:
        return msgspec.yaml.decode(path.read_bytes(), type=Plan)
    except OSError as error:
        raise NotFound(f"cannot read {path}: {error.strerror}", param="plan") from error
    except msgspec.DecodeError as error:
        raise BadConfig(f"{path}: not a plan: {error}", param="plan") from error


def parse_slo(text: str) -> Slo:
    """``ttft=500ms,tpot=50ms``, either alone too."""
    targets: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name not in ("ttft", "tpot") or name in targets:
            raise BadConfig(
                f'slo {text!r}: {name!r} is not ttft or tpot, or comes twice (as in "ttft=500ms,tpot=50ms")'
            )
        targets[name] = parse_seconds(value, f"slo {text!r}")
    return Slo(ttft_s=targets.get("ttft", math.inf), tpot_s=targets.get("tpot", math.inf))


def parse_seconds(text: str, where: str) -> float:
    """``500ms``, ``0.5s``, ``2m``."""
    for unit, factor in (("ms", 0.001), ("s", 1.0), ("m", 60.0)):
        if text.endswith(unit):
            try:
                seconds = float(text.removesuffix(unit)) * factor
            except ValueError:
                break
            if math.isfinite(seconds) and seconds > 0:
                return seconds
    raise BadConfig(f"{where}: {text!r} is not a time above 0 such as 500ms, 2s or 1m")


def parse_budget(text: str) -> tuple[int, float]:
    """(Evaluations, seconds): one of them is without end."""
    if text.isdecimal() and int(text) > 0:
        return int(text), math.inf
    return sys.maxsize, parse_seconds(text, "budget (a number, or a time)")


def parse_window(text: str) -> Window:
    start, _, end = text.partition(":")
    try:
        return Window(float(start or 0), float(end or "inf"))
    except ValueError as error:
        raise BadConfig(f"window {text!r} is not START:END in seconds", param="window") from error


@contextmanager
def _interrupts() -> Iterator["_Flag"]:
    """Ctrl-C asks for the best so far; a second one ends the program."""
    flag = _Flag()
    old = signal.signal(signal.SIGINT, flag.raised)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, old)


class _Flag:
    def __init__(self) -> None:
        self._is_up = False

    def __call__(self) -> bool:
        return self._is_up

    def raised(self, signal_number: int, frame: FrameType | None) -> None:
        if self._is_up:
            raise KeyboardInterrupt
        self._is_up = True


def _compiled(problem: Problem) -> float:
    """Seconds until the simulator is compiled, or loaded from the cache of an earlier run."""
    started_s = time.perf_counter()
    _show("preparing the simulator (the first time: half a minute)")
    Search(problem).warm_up()
    return time.perf_counter() - started_s


def _progress(evaluations: int, attainment: float) -> None:
    _show(f"{evaluations} plans, best attainment {attainment:.4f}")


def _show(line: str) -> None:
    """On a terminal, in the place of the last one."""
    if sys.stderr.isatty():
        print(f"\r{line:<60}\r", end="", file=sys.stderr, flush=True)


def _print(made: PlanReport, took_s: float) -> None:
    found = made.found
    print_table(
        ["policy", "attainment", "goodput/s", "TTFT p99 s", "TPOT p99 s", "planned", "setting"],
        [
            [
                one.policy,
                one.score.attainment,
                one.score.goodput_per_s,
                one.score.ttft_s["p99"],
                one.score.tpot_s["p99"],
                one.planned,
                one.setting,
            ]
            for one in made.policies
        ],
    )
    typer.echo()
    for reason in found.reasons:
        typer.echo(reason)
    typer.echo(f"{found.evaluations} plans scored in {took_s:.1f} s (--budget {found.evaluations} repeats it)")
    typer.echo(f"fluid bound: attainment {found.bound:.4f}; {made.gpus_bound:.1f} GPUs for 99 %")
    if found.kept:
        typer.echo("the current plan stays: no other is better by more than its move costs")
    elif found.move is not None:
        typer.echo(f"the move from the current plan costs {found.move.lost_gpu_s:.1f} GPU seconds")
