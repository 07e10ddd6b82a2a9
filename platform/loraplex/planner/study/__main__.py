"""``python -m loraplex.planner.study``: prints a table, writes all figures as JSON."""

import argparse
import json
import resource
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from loraplex.planner.baselines import baselines, selective
from loraplex.planner.problem import Problem
from loraplex.planner.search import Search
from loraplex.planner.study.hours import Functions, Hours, Recipe, build
from loraplex.planner.study.study import (
    BAND,
    GPU,
    SHARE,
    SLOS,
    bounds,
    compared_rows,
    fewest_gpus,
    nodes,
    planned,
    problem_of,
    scaled,
)

_DATA = Path("notebooks/data")
_BASELINE_SAMPLE = 40_000
"""Requests that the baselines are tuned on."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--functions", type=Path, default=_DATA / "maf2019_500_minutes.parquet")
    parser.add_argument("--lengths", type=Path, default=_DATA / "servegen_length_quantiles.parquet")
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--minutes", type=int, default=60, help="Of each window; default: 60")
    parser.add_argument("--cv", type=float, default=4.0, help="Of an adapter's gaps within a minute; default: 4")
    parser.add_argument("--scale", type=float, default=2.0, help="Of the invocations, the first that is tried")
    parser.add_argument("--budget", type=float, default=55.0, help="Seconds for search and confirmation; default: 55")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="Count CPU seconds of this process instead: on a machine that others use",
    )
    parser.add_argument("--seed", type=int, default=0, help="Of arrivals, lengths and search")
    parser.add_argument("--most-gpus", type=int, default=0, help=f"Also the fewest GPUs for {SHARE}, up to these")
    parser.add_argument("--out", type=Path, help="File for the figures, JSON")
    arguments = parser.parse_args()
    functions = Functions.read(arguments.functions)
    recipe = Recipe(cv=arguments.cv, minutes=arguments.minutes, seed=arguments.seed)
    Search(
        problem_of(build(functions, arguments.lengths, replace(recipe, minutes=1)), num_gpus=arguments.gpus)
    ).warm_up()
    made: dict[float, Hours] = {}

    def at_scale(scale: float) -> Problem:
        made[scale] = build(functions, arguments.lengths, replace(recipe, scale=scale))
        return problem_of(made[scale], num_gpus=arguments.gpus)

    scale, problem, compared = scaled(
        at_scale, first=arguments.scale, tuned=partial(baselines, max_sample=_BASELINE_SAMPLE, seed=arguments.seed)
    )
    hours = made[scale]
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    wall_s = time.perf_counter()
    found, took_s = planned(problem, budget_s=arguments.budget, clock=clock, seed=arguments.seed)
    wall_s = time.perf_counter() - wall_s
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rows = compared_rows(problem, found, compared, hours.following)
    most, least_gpus = bounds(problem)
    figures: dict[str, object] = {
        "gpus": f"{arguments.gpus} x {GPU}",
        "slos": {base: asdict(slo) for base, slo in SLOS.items()},
        "scale": scale,
        "cv": arguments.cv,
        "seed": arguments.seed,
        "requests": {"planning": len(hours.planning), "following": len(hours.following)},
        "took_s": took_s,
        "clock": "cpu" if arguments.cpu_time else "wall",
        "wall_s": wall_s,
        "peak_bytes": peak_bytes,
        "evaluations": found.evaluations,
        "attainment_bound": most,
        "gpus_bound": least_gpus,
        "policies": [asdict(row) for row in rows],
        "steps": [asdict(step) for step in found.steps],
        "reasons": found.reasons,
    }
    print(f"scale {scale:.3f} (best baseline within {BAND}), {len(hours.planning)} + {len(hours.following)} requests")
    print(
        f"planned in {took_s:.1f} s ({figures['clock']} time; {found.evaluations} evaluations), "
        f"at most {peak_bytes / 2**30:.2f} GiB"
    )
    for row in rows:
        bases = ", ".join(f"{base} {value:.4f}" for base, value in row.by_base.items())
        print(f"{row.policy:<22} planning {row.planning:.4f}  next {row.following:.4f} ({bases})  {row.setting}")
    print(f"bound: attainment {most:.4f}; {least_gpus:.1f} GPUs for {SHARE:.0%}", flush=True)
    if arguments.most_gpus:
        figures["fewest_gpus"] = table = {}
        for policy in ("loraplex", "selective replication"):

            def attained(num_gpus: int, policy: str = policy) -> float:
                larger = problem.changed(nodes=nodes(num_gpus))
                if policy == "loraplex":
                    found, _ = planned(larger, budget_s=arguments.budget, clock=clock, seed=arguments.seed)
                    return found.attainment
                return selective(larger, seed=arguments.seed)[1].attainment

            gpus, reached = fewest_gpus(attained, least=8, most=arguments.most_gpus)
            table[policy] = {"gpus": gpus, "attainment": reached}
            print(f"{policy}: {gpus} GPUs for {SHARE:.0%} (attainment {reached:.4f})", flush=True)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
