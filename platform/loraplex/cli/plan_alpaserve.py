"""``loraplex plan-alpaserve``: our planner on AlpaServe cases, under AlpaServe's contract."""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
import typer

from loraplex.cli.connection import JsonOption
from loraplex.cli.output import print_json, print_table
from loraplex.cli.simulate_alpaserve import CasesOption, ProfilesOption
from loraplex.planner.alpaserve.bound import goodput_bound
from loraplex.planner.alpaserve.problem import Problem
from loraplex.planner.alpaserve.replan import Replanned, replan
from loraplex.planner.alpaserve.search import plan
from loraplex.simulator.alpaserve import Group, Layout, StageProfile, Work, goodput, simulate
from loraplex.simulator.alpaserve_cases import Case, load_cases

_RIVALS = ("mp-search", "mp-search-sep")
_SEARCH_S = 4.0
"""A search without ``--budget`` ends here on a machine that is slow; the evaluations printed repeat it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    goodput: float
    """On the test arrivals."""
    wall_s: float
    """Of the search, nothing compiled in it."""
    feasible: bool
    placement: dict[str, Any]
    training_goodput: float
    bound: float
    """No placement serves a greater share of the test arrivals."""
    evaluations: int
    gained: dict[str, int]


def plan_alpaserve_command(
    cases: CasesOption,
    profiles: ProfilesOption = None,
    budget: Annotated[
        int | None, typer.Option("--budget", min=1, help="Placements to score per case; repeats a run that printed it.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the search.")] = 0,
    case_name: Annotated[list[str] | None, typer.Option("--case", help="Only this case; may be repeated.")] = None,
    replan_every: Annotated[
        float | None,
        typer.Option(help="Also plan again every so many seconds, moves at 10 GiB/s, and compare with staying.", min=1),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Plan AlpaServe cases on their training arrivals and score the placements on their test arrivals."""
    compile_s = _compile()
    rows: dict[str, _Row] = {}
    replanned: dict[str, Replanned] = {}
    rivals: dict[str, float | None] = {}
    for case in load_cases(cases, database=profiles):
        if case_name and case.name not in case_name:
            continue
        rows[case.name] = _plan(case, budget, seed)
        rivals[case.name] = max(
            (recorded.goodput or 0.0 for name, recorded in case.policies.items() if name in _RIVALS), default=None
        )
        if replan_every is not None:
            replanned[case.name] = replan(
                _problem(case, case.test_work()), every_s=replan_every, evaluations=budget, seed=seed
            )
    summary = f"compiled in {compile_s:.1f} s before the first case"
    if as_json:
        found = {name: asdict(row) for name, row in rows.items()}
        for name, result in replanned.items():
            found[name]["replanned"] = _replanned_json(result)
        print_json({"compile_s": compile_s, "cases": found})
        typer.echo(summary, err=True)
        return
    print_table(
        ["case", "goodput", "AlpaServe's best", "bound", "feasible", "seconds", "evaluations", "groups"],
        [
            [
                name,
                row.goodput,
                rivals[name],
                row.bound,
                row.feasible,
                row.wall_s,
                row.evaluations,
                len(row.placement["groups"]),
            ]
            for name, row in rows.items()
        ],
    )
    if replanned:
        print_table(
            ["case", "re-planned", "moves", "GiB moved per GPU", "kept", "AlpaServe's, kept"],
            [
                [name, one.goodput, one.num_moves, one.moved_gib, one.static_goodput, one.alpaserve_goodput]
                for name, one in replanned.items()
            ],
        )
    typer.echo(summary)


def _plan(case: Case, budget: int | None, seed: int) -> _Row:
    training, test = case.training_work(), case.test_work()
    problem = _problem(case, training)
    start_s = time.perf_counter()
    # A budget that is given is used up, however long it takes.
    limit_s = math.inf if budget is not None else start_s + _SEARCH_S
    found = plan(problem, evaluations=budget, seed=seed, out_of_time=lambda: time.perf_counter() > limit_s)
    wall_s = time.perf_counter() - start_s
    scored = training.scored()
    return _Row(
        goodput=goodput(test, simulate(test, found.groups, case.profiles)),
        wall_s=wall_s,
        feasible=problem.is_feasible(found.groups),
        placement={"groups": _groups_json(found.groups)},
        training_goodput=found.num_good / max(1, scored.stop - scored.start),
        bound=goodput_bound(problem.on(test)),
        evaluations=found.evaluations,
        gained={name: count for name, count in found.gained.items() if count},
    )


def _problem(case: Case, work: Work) -> Problem:
    return Problem.of(
        work,
        case.profiles,
        num_devices=case.num_devices,
        devices_per_node=case.devices_per_node,
        memory_gib=case.memory_gib,
    )


def _groups_json(groups: Sequence[Group]) -> list[dict[str, Any]]:
    return [
        {"dp": group.layout.dp, "op": group.layout.op, "pp": group.layout.pp, "models": list(group.models)}
        for group in groups
    ]


def _replanned_json(result: Replanned) -> dict[str, Any]:
    return {
        "goodput": result.goodput,
        "static_goodput": result.static_goodput,
        "alpaserve_static_goodput": result.alpaserve_goodput,
        "num_moves": result.num_moves,
        "moved_gib": result.moved_gib,
        "placement": {
            "start_times": list(result.start_s),
            "placements": [{"groups": _groups_json(groups)} for groups in result.placements],
        },
    }


def _compile() -> float:
    """Seconds: everything that is compiled, once, on two requests."""
    start_s = time.perf_counter()
    profiles = {
        ("one", Layout(1, 1, 1)): StageProfile(latency_s=(0.1,), weight_gib=(1.0,)),
        ("one", Layout(1, 1, 2)): StageProfile(latency_s=(0.05, 0.05), weight_gib=(0.5, 0.5)),
    }
    work = Work(
        model_types=("one", "one"),
        slo_s=np.array([0.2, 0.2]),
        arrival_s=np.array([0.0, 0.0, 0.0, 40.0, 40.0, 40.0]),
        model=np.array([0, 0, 1, 0, 0, 1], dtype=np.int32),
    )
    plan(Problem.of(work, profiles, num_devices=2, devices_per_node=2, memory_gib=1.0), evaluations=100)
    return time.perf_counter() - start_s
