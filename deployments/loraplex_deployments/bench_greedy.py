"""``python -m loraplex_deployments.bench_greedy``: what tenants keep beside one that asks for ten times its share.

Real gateways, router, scheduler, Ray actors and streams; the replicas take the time of a slowed H100 and compute
nothing. Tenants that ask for less than an equal share of what the replicas can do, and one that asks for ten of them.
Fair is the max-min division of what was served. As a control the same requests once more in the name of a single
tenant, which is first come, first served. Beside the measured figures stand those of the exact simulator.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

import msgspec
import numpy as np
from loraplex.engine import EngineConfig
from loraplex.loadgen.outcomes import Outcomes
from loraplex.router.config import RouterConfig
from loraplex.simulator.crowds import GREEDY, greedy_tenant
from loraplex.simulator.types import Slo
from loraplex.tenancy.fair_shares import jain_index, max_min_shares
from loraplex.traces.arrivals import Arrivals

from loraplex_deployments.bench_processes import CpuUse
from loraplex_deployments.bench_report import report, say
from loraplex_deployments.bench_tenants import (
    Machine,
    TenantSetup,
    error_counts,
    predicted,
    tenant_platform,
    within_context,
)

_EVERYONE = "everyone"


class GreedyOptions(msgspec.Struct, frozen=True, kw_only=True):
    setup: TenantSetup = msgspec.field(
        default_factory=lambda: TenantSetup(
            factor=8.0,
            engine=EngineConfig(max_running=32, max_waiting=8),
            router=RouterConfig(max_queued_requests=256, max_queue_wait_s=10.0),
        )
    )
    share_per_s: float = 3.6
    """Requests: an equal share of what the replicas can do."""
    asked: tuple[float, ...] = (0.6, 0.7, 0.8, 0.8, 0.8, 0.9, 0.95)
    """Shares that each of the others asks for."""
    greedy_factor: float = 10.0
    adapters_per_tenant: int = 4
    prompt_tokens: float = 256.0
    """Medians of lognormal lengths."""
    output_tokens: float = 48.0
    begin_s: float = 10.0
    end_s: float = 50.0
    """Requests that are due between these are scored."""
    seed: int = 0


class TenantFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Throughputs in output tokens per second, of the requests that were answered."""

    asked: float
    served: float
    fair: float
    ratio: float
    """served / fair."""
    ttft_p99_s: float
    """Of the answered."""


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    tenants: dict[str, TenantFigures]
    least_of_others: float
    """The smallest ratio but the greedy tenant's."""
    jain_index: float
    """Of the others' ratios."""
    jain_index_all: float
    others_ttft_p99_s: float
    greedy_shares: float
    """What the greedy tenant asked for, in equal shares of what was served."""


class GreedyRun(msgspec.Struct, frozen=True, kw_only=True):
    measured: Figures
    simulated: Figures
    errors: dict[str, int]
    """HTTP status or kind of failure, and how often."""
    cpu: CpuUse


class GreedyResult(msgspec.Struct, frozen=True, kw_only=True):
    options: GreedyOptions
    executor: str
    machine: Machine
    by_tenant: GreedyRun
    first_come: GreedyRun
    """The control."""


def arrivals_of(options: GreedyOptions) -> Arrivals:
    arrivals = greedy_tenant(
        seed=options.seed,
        end_s=options.end_s,
        share_per_s=options.share_per_s,
        asked=options.asked,
        greedy_factor=options.greedy_factor,
        adapters_per_tenant=options.adapters_per_tenant,
        prompt=options.prompt_tokens,
        output=options.output_tokens,
    )
    return within_context(arrivals)


def of_one_tenant(arrivals: Arrivals) -> Arrivals:
    """The same requests in the name of a single tenant, whose adapters are others of the same sizes."""
    return dataclasses.replace(
        arrivals,
        tenants=(_EVERYONE,),
        tenant=np.zeros_like(arrivals.tenant),
        adapters=tuple(adapter._replace(tenant=_EVERYONE) for adapter in arrivals.adapters),
    )


def run_greedy_bench(options: GreedyOptions) -> GreedyResult:
    """Raises what ``start_platform`` raises."""
    arrivals = arrivals_of(options)
    together = of_one_tenant(arrivals)
    with (
        tempfile.TemporaryDirectory(prefix="loraplex-bench-") as folder,
        tenant_platform(options.setup, (*arrivals.adapters, *together.adapters), Path(folder), say) as platform,
    ):
        runs = []
        for sent in (arrivals, together):
            samples, cpu = platform.send(sent, seed=options.seed)
            simulated = predicted(options.setup, sent, Slo())
            runs.append(
                GreedyRun(
                    measured=figures_of(Outcomes.of_samples(samples), arrivals, options),
                    simulated=figures_of(simulated, arrivals, options),
                    errors=error_counts(samples),
                    cpu=cpu,
                )
            )
            say(_line(runs[-1]))
    return GreedyResult(
        options=options,
        executor=options.setup.executor,
        machine=Machine.this(),
        by_tenant=runs[0],
        first_come=runs[1],
    )


def figures_of(outcomes: Outcomes, arrivals: Arrivals, options: GreedyOptions) -> Figures:
    """``outcomes`` in the order of ``arrivals``, which say whose each request is."""
    scored = (arrivals.arrival_s >= options.begin_s) & (arrivals.arrival_s < options.end_s)
    num_tenants, greedy = len(arrivals.tenants), arrivals.tenants.index(GREEDY)
    answered = scored & outcomes.served
    tokens_per_s = [
        np.bincount(arrivals.tenant[rows], arrivals.output_tokens[rows], num_tenants)
        / (options.end_s - options.begin_s)
        for rows in (scored, answered)
    ]
    asked, served = tokens_per_s
    fair = max_min_shares(asked.tolist(), float(served.sum()))
    ratios = served / fair
    others = np.delete(ratios, greedy)

    def ttft_p99_s(rows: "np.ndarray[tuple[int], np.dtype[np.bool_]]") -> float:
        return float(np.percentile(outcomes.ttft_s[answered & rows], 99)) if (answered & rows).any() else float("inf")

    return Figures(
        tenants={
            name: TenantFigures(
                asked=float(asked[index]),
                served=float(served[index]),
                fair=float(fair[index]),
                ratio=float(ratios[index]),
                ttft_p99_s=ttft_p99_s(arrivals.tenant == index),
            )
            for index, name in enumerate(arrivals.tenants)
        },
        least_of_others=float(others.min()),
        jain_index=jain_index(others.tolist()),
        jain_index_all=jain_index(ratios.tolist()),
        others_ttft_p99_s=ttft_p99_s(arrivals.tenant != greedy),
        greedy_shares=float(asked[greedy] / (served.sum() / num_tenants)),
    )


def _line(run: GreedyRun) -> str:
    measured, simulated = run.measured, run.simulated
    ratios = ", ".join(f"{name} {tenant.ratio:.3f}" for name, tenant in measured.tenants.items())
    return (
        f"least of the others {measured.least_of_others:.3f} (simulated {simulated.least_of_others:.3f}), Jain index "
        f"{measured.jain_index:.4f}, of all {measured.jain_index_all:.4f}; others' TTFT p99 "
        f"{measured.others_ttft_p99_s:.2f} s; the greedy one asked for {measured.greedy_shares:.1f} shares; of fair "
        f"throughput: {ratios}; errors {run.errors}; CPU {run.cpu.machine:.0%}, ours {run.cpu.ours:.0%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="What tenants keep beside one that asks for ten times its share.")
    parser.add_argument("--gateways", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=40.0, help="that are scored, after ten that are not")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file for all figures")
    given = parser.parse_args()
    options = GreedyOptions(seed=given.seed)
    options = msgspec.structs.replace(
        options,
        setup=msgspec.structs.replace(options.setup, gateways=given.gateways),
        end_s=options.begin_s + given.seconds,
    )
    result = run_greedy_bench(options)
    setup = options.setup
    report(
        msgspec.to_builtins(result),
        [
            f"{result.executor}; {setup.replicas} replicas, {setup.gateways} gateways, {result.machine.cores} cores",
            f"by tenant: {_line(result.by_tenant)}",
            f"first come, first served: {_line(result.first_come)}",
        ],
        cpu=max(run.cpu.machine for run in (result.by_tenant, result.first_come)),
        out=given.out,
    )


if __name__ == "__main__":
    main()
