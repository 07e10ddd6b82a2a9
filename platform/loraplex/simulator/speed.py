"""``python -m loraplex.simulator.speed``: requests that the fast simulator simulates in a second on one core.

A plan is simulated as a search does it: the workload is made once, the cluster and its state for each plan.
"""

import argparse
import json
import time

from loraplex.simulator.fast import simulate
from loraplex.simulator.scenarios import make_arrivals, make_input
from loraplex.simulator.workload import Workload


def measure(*, num_groups: int, num_requests: int, rate_per_group: float, num_adapters: int, runs: int) -> object:
    """Wall and CPU time of the best of ``runs``; compiling (or loading what was compiled) apart."""
    arrivals = make_arrivals(
        num_requests=num_requests, rate=rate_per_group * num_groups, num_adapters=num_adapters, num_tenants=50
    )
    given = make_input(arrivals, num_groups=num_groups)
    workload = Workload.of(given.arrivals, given.adapters)
    start_s = time.perf_counter()
    result = simulate(given, workload)
    first_s = time.perf_counter() - start_s
    wall_s, cpu_s = [], []
    for _ in range(runs):
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        result = simulate(given, workload)
        wall_s.append(time.perf_counter() - start_s)
        cpu_s.append(time.process_time() - start_cpu_s)
    return {
        "groups": num_groups,
        "requests": num_requests,
        "adapters": num_adapters,
        "steps": sum(group.num_steps for group in result.groups),
        "gpu_use": round(result.gpu_use, 4),
        "ttft_p99_s": round(result.score.ttft_s["p99"], 4),
        "first_run_s": round(first_s, 3),
        "wall_s": round(min(wall_s), 4),
        "cpu_s": round(min(cpu_s), 4),
        "requests_per_s": round(num_requests / min(wall_s)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, default=64)
    parser.add_argument("--requests", type=int, default=500_000)
    parser.add_argument("--rate", type=float, default=28.0, help="Requests per second and group")
    parser.add_argument("--adapters", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    found = measure(
        num_groups=options.groups,
        num_requests=options.requests,
        rate_per_group=options.rate,
        num_adapters=options.adapters,
        runs=options.runs,
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
