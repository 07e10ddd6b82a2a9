"""``python -m loraplex_deployments.bench_simulated``: how near the simulator is to the running platform.

Real gateway, router, scheduler, Ray actors and streams; the replicas are paced: they take the time of a cost profile
and compute nothing, so that the simulator knows what a step costs and what differs is the platform. Each workload
begins with requests of every adapter that do not count, on both sides. What HTTP and the gateway add to a first token
is measured before, with lone requests, and given to the simulator. Targets are multiples (SLO scales, as AlpaServe's)
of what a lone request takes; loads are such that the attainment at five times is neither 0 nor 1 in most. Prints both
sides and the CPU that the machine used.
"""

import argparse
import asyncio
import dataclasses
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
from loraplex.config.platform import BaseModelConfig
from loraplex.core.plan import BasePlacement, GroupPlan, Plan, Shape
from loraplex.loadgen.comparison import compare
from loraplex.loadgen.completion import CompletionClient
from loraplex.loadgen.config import RequestConfig
from loraplex.loadgen.http_client import HttpClient
from loraplex.loadgen.open_loop import run_open_loop
from loraplex.loadgen.outcomes import Outcomes
from loraplex.loadgen.prediction import predict
from loraplex.loadgen.prompts import PromptMaker, RandomTokens
from loraplex.loadgen.schedule import PlannedRequest
from loraplex.loadgen.targets import Target
from loraplex.model_runner.build import load_model_spec
from loraplex.simulator.exact import simulate_exact
from loraplex.simulator.scenarios import make_arrivals
from loraplex.simulator.types import AdapterSize, CostKey, ReplicaCost, Slo
from loraplex.testing.paced_executor import paced_cost

from loraplex_deployments.bench_cluster import (
    BASE,
    BenchCluster,
    ClusterSetup,
    PacedSetup,
    bench_cluster,
    platform_config,
)
from loraplex_deployments.bench_report import report, say

_GPU = "h100-80gb"
_LORA_RANK = 16
_PRIME_S = 8.0
_LONE = 8
_MAX_DIFFERENCE = 0.03
_SLO_SCALE = 5.0
_CURVE = (3.0, 4.0, 5.0, 8.0)
"""SLO scales at which the attainment is told beside."""
_TYPICAL = (128, 48)
"""Prompt and output tokens of the lone request."""


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """Per replica and unslowed: the rate is multiplied by the replicas and divided by the factor."""

    rate: float
    cv: float = 1.0
    zipf: float = 0.9
    prompt: float = 128.0
    output: float = 48.0
    crowd: float = 1.0
    """The first adapter's requests in the second third come so many times."""


WORKLOADS = {
    "steady": Workload(rate=50.0),
    "bursty": Workload(rate=35.0, cv=4.0),
    "skewed": Workload(rate=50.0, zipf=2.0),
    "long-prompts": Workload(rate=17.5, prompt=800.0, output=32.0),
    "long-outputs": Workload(rate=20.0, prompt=64.0, output=160.0),
    "flash-crowd": Workload(rate=30.0, crowd=3.0),
}


class Options(msgspec.Struct, frozen=True, kw_only=True):
    workloads: tuple[str, ...] = tuple(WORKLOADS)
    seconds: float = 60.0
    """Of arrivals, in each workload."""
    replicas: int = 4
    gateways: int = 1
    adapters: int = 4
    factor: float = 24.0
    seed: int = 0


def run(options: Options) -> dict[str, Any]:
    """Starts the platform, runs the workloads one after the other, and ends it."""
    paced = PacedSetup(base="llama3-8b", profile=_GPU, factor=options.factor)
    setup = ClusterSetup(nodes=2, gpus_per_node=-(-options.replicas // 2), replicas=options.replicas, paced=paced)
    setup = msgspec.structs.replace(setup, adapters=options.adapters, gateways=options.gateways)
    base = platform_config(setup, "local").base_models[0]
    prompts = RandomTokens(load_model_spec(base.model, BASE).vocab_size, seed=options.seed)
    with bench_cluster(setup, say) as cluster:
        side = _Sides(cluster, base, options, prompts)
        overhead_s = side.overhead_s()
        say(f"HTTP and gateway add {1e3 * overhead_s:.1f} ms to a first token")
        found = {}
        for number, name in enumerate(options.workloads):
            found[name] = side.run(WORKLOADS[name], overhead_s, seed=options.seed + number)
            say(_line(name, found[name]))
    return {
        "options": msgspec.to_builtins(options),
        "executor": f"paced: {paced.base} on {paced.profile}, {paced.factor:g} times slower",
        "cores": os.cpu_count(),
        "overhead_s": overhead_s,
        "workloads": found,
    }


class _Sides:
    def __init__(self, cluster: BenchCluster, base: BaseModelConfig, options: Options, prompts: PromptMaker) -> None:
        self._cluster, self._base, self._options, self._prompts = cluster, base, options, prompts
        self._targets = (*cluster.targets, dataclasses.replace(cluster.targets[0], model=str(BASE)))
        """The adapters', then the base's."""
        group = GroupPlan(name="", shape=Shape(), gpu=_GPU, bases=(BasePlacement(base_model_id=BASE),))
        names = [f"group-{index}" for index in range(options.replicas)]
        self._plan = Plan(version=1, groups=tuple(dataclasses.replace(group, name=name) for name in names))
        self._costs = {CostKey(gpu=_GPU, base_model_id=BASE, shape=Shape()): _cost_of(base)}

    def overhead_s(self) -> float:
        """Median of what the first token of a lone request for the base takes more than the simulator says."""
        gap_s = 0.25 * self._options.factor
        schedule = [_planned(i, i * gap_s, self._targets[-1], 64, 2) for i in range(_LONE)]
        measured, predicted = self._measure(schedule), self._predict(schedule, Slo(), 0.0)
        # The first one opens the connection.
        added_s: float = statistics.median((measured.ttft_s - predicted.ttft_s)[1:].tolist())
        return max(0.0, added_s)

    def run(self, workload: Workload, overhead_s: float, *, seed: int) -> dict[str, Any]:
        schedule = self._schedule(workload, seed)
        predicted = self._predict(schedule, Slo(), overhead_s).since(_PRIME_S)
        lone = self._predict([_planned(0, 0.0, self._targets[-1], *_TYPICAL)], Slo(), 0.0)
        slo = Slo(ttft_s=_SLO_SCALE * float(lone.ttft_s[0]), tpot_s=_SLO_SCALE * float(lone.tpot_s[0]))
        psutil.cpu_percent()
        measured = self._measure(schedule).since(_PRIME_S)
        cpu = psutil.cpu_percent() / 100
        figures = compare(measured, predicted, slo)
        return {
            "workload": msgspec.to_builtins(workload),
            "requests": len(measured),
            "unanswered": int(np.count_nonzero(~measured.served)),
            "slo": dataclasses.asdict(slo),
            "cpu": cpu,
            "attainment_by_scale": {
                f"{scale:g}": [float(np.mean(side.good(slo, scale / _SLO_SCALE))) for side in (measured, predicted)]
                for scale in _CURVE
            },
            "figures": {
                figure.name: {
                    "measured": figure.measured,
                    "predicted": figure.predicted,
                    "difference": figure.difference,
                }
                for figure in figures
            },
        }

    def _schedule(self, workload: Workload, seed: int) -> list[PlannedRequest]:
        """For ``_PRIME_S`` every adapter in turn, then the workload."""
        options, num_adapters = self._options, self._options.adapters
        rate = workload.rate * options.replicas / options.factor
        made = make_arrivals(
            num_requests=max(8, round(rate * options.seconds)),
            rate=rate,
            num_adapters=num_adapters,
            cv=workload.cv,
            zipf=workload.zipf,
            prompt=workload.prompt,
            output=workload.output,
            seed=seed,
        )
        num_prime = 4 * options.replicas * num_adapters
        planned = [(_PRIME_S / 2 * i / num_prime, self._targets[i % num_adapters], 32, 4) for i in range(num_prime)]
        third_s = float(made.arrival_s[-1]) / 3
        lengths = zip(made.prompt_tokens.tolist(), made.output_tokens.tolist(), strict=True)
        limit = load_model_spec(self._base.model, BASE).max_context_tokens // 2 - 1
        random = np.random.default_rng(seed)
        for at_s, adapter, (prompt, output) in zip(
            made.arrival_s.tolist(), made.adapter.tolist(), lengths, strict=True
        ):
            target = self._targets[adapter if random.random() < 0.8 else -1]
            times = int(workload.crowd) if adapter == 0 and third_s <= at_s < 2 * third_s else 1
            size = (min(max(prompt, 2), limit), min(max(output, 2), limit))
            planned += [(_PRIME_S + at_s + 0.05 * again, target, *size) for again in range(times)]
        planned.sort(key=lambda request: request[0])
        return [_planned(seed * 100_000 + i, *request) for i, request in enumerate(planned)]

    def _measure(self, schedule: Sequence[PlannedRequest]) -> Outcomes:
        samples = asyncio.run(self._send(schedule))
        samples.sort(key=lambda sample: sample.scheduled_s)
        return Outcomes.of_samples(samples)

    async def _send(self, schedule: Sequence[PlannedRequest]) -> Any:
        config = RequestConfig(seed=self._options.seed)
        http = HttpClient(self._cluster.url, connect_timeout_s=config.connect_timeout_s)
        try:
            return await run_open_loop(schedule, CompletionClient(http, config), self._prompts)
        finally:
            http.close()

    def _predict(self, schedule: Sequence[PlannedRequest], slo: Slo, overhead_s: float) -> Outcomes:
        return predict(
            schedule,
            self._plan,
            costs=self._costs,
            sizes=lambda adapters: tuple(AdapterSize(lora_rank=_LORA_RANK) for _ in adapters),
            engine=self._base.engine,
            slo=slo,
            simulator=simulate_exact,
            overhead_s=overhead_s,
        )


def _cost_of(base: BaseModelConfig) -> ReplicaCost:
    """With as many pages as the config gives the replicas."""
    assert base.paced is not None
    cost = paced_cost(base.paced, base.engine, BASE)
    if base.executor.num_pages is None:
        return cost
    memory = cost.memory
    gpu_bytes = memory.weight_bytes + memory.activation_bytes + base.executor.num_pages * memory.page_bytes
    return dataclasses.replace(cost, memory=msgspec.structs.replace(memory, gpu_bytes=gpu_bytes))


def _planned(index: int, at_s: float, target: Target, prompt_tokens: int, output_tokens: int) -> PlannedRequest:
    return PlannedRequest(
        index=index, at_s=at_s, target=target, prompt_tokens=prompt_tokens, output_tokens=output_tokens
    )


def _line(name: str, found: dict[str, Any]) -> str:
    figures = found["figures"]
    attainment = figures["attainment"]
    parts = [
        f"{label} {1e3 * figures[key]['measured']:.0f} / {1e3 * figures[key]['predicted']:.0f} ms"
        for label, key in (("TTFT p50", "ttft_p50_s"), ("p99", "ttft_p99_s"), ("TPOT p50", "tpot_p50_s"))
        if figures[key]["measured"] is not None
    ]
    scales = [f"{scale}x {left:.2f} / {right:.2f}" for scale, (left, right) in found["attainment_by_scale"].items()]
    return (
        f"{name}: {found['requests']} requests, attainment {attainment['measured']:.3f} / "
        f"{attainment['predicted']:.3f} ({100 * attainment['difference']:+.1f} points; at "
        f"{', '.join(scales)}), {', '.join(parts)}; CPU {found['cpu']:.0%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="The exact simulator against the running platform, paced replicas.")
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"of {', '.join(WORKLOADS)}; default: all")
    parser.add_argument("--seconds", type=float, default=60.0, help="of arrivals, in each workload")
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--gateways", type=int, default=1, help="processes; the simulator has one")
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--factor", type=float, default=24.0, help="how many times slower than the profile")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file for all figures")
    given = vars(parser.parse_args())
    out = given.pop("out")
    given["workloads"] = tuple(given["workloads"]) or tuple(WORKLOADS)
    unknown = [name for name in given["workloads"] if name not in WORKLOADS]
    if unknown:
        parser.error(f"no workload {unknown[0]!r}")
    started_s = time.monotonic()
    result = run(Options(**given))
    result["wall_s"] = time.monotonic() - started_s
    differences = [abs(found["figures"]["attainment"]["difference"]) for found in result["workloads"].values()]
    near = sum(difference <= _MAX_DIFFERENCE for difference in differences)
    report(
        result,
        [
            f"{result['executor']}; {result['cores']} cores",
            f"{given['replicas']} replicas, {given['gateways']} gateways; measured / predicted:",
            *(_line(name, found) for name, found in result["workloads"].items()),
            f"{near} of {len(differences)} within {100 * _MAX_DIFFERENCE:.0f} points; {result['wall_s']:.0f} s",
        ],
        cpu=max(found["cpu"] for found in result["workloads"].values()),
        out=out,
    )


if __name__ == "__main__":
    main()
