"""``python -m loraplex_deployments.bench_crowd``: a flash crowd for one adapter, by the router's policy and by others'.

Real gateways, router, scheduler, Ray actors and streams; the replicas take the time of a slowed H100 and compute
nothing. The same arrivals for each policy, on a platform that was started anew: a span in which adapters are loaded, a
calm one, and one in which one adapter comes twenty times as often within five seconds; the other requests of the three
spans are the same, but for their prompts. Beside the measured figures stand those of the exact simulator.
"""

import argparse
import tempfile
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
from loraplex.loadgen.outcomes import Outcomes, percentile
from loraplex.router.config import RouterConfig
from loraplex.simulator.crowds import HOT, flash_crowd
from loraplex.simulator.routing_study import POLICIES
from loraplex.simulator.types import Slo
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

_TTFT_S, _TPOT_S = 0.06, 0.0145
"""Targets at an H100's own pace."""


class CrowdOptions(msgspec.Struct, frozen=True, kw_only=True):
    setup: TenantSetup = msgspec.field(default_factory=TenantSetup)
    """Its policy is replaced by each of ``policies``."""
    policies: tuple[str, ...] = POLICIES
    span_s: float = 40.0
    """Of each of the three."""
    ramp_s: float = 5.0
    crowd_factor: float = 20.0
    hot_rate: float = 1.0
    """Requests per second of the crowd's adapter before it comes."""
    other_rate: float = 15.0
    """Of all other adapters together."""
    adapters: int = 100
    tenants: int = 8
    """The first one has the crowd."""
    prompt_tokens: float = 256.0
    """Medians of lognormal lengths."""
    output_tokens: float = 48.0
    seed: int = 0

    @property
    def slo(self) -> Slo:
        return Slo(ttft_s=_TTFT_S * self.setup.factor, tpot_s=_TPOT_S * self.setup.factor)


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    attainment: float
    """Of all requests of the crowd's span, as what follows where nothing else is said."""
    hot_attainment: float
    others_attainment: float
    """Other tenants'."""
    calm_attainment: float
    """Of the calm span."""
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    others_ttft_p99_s: float
    others_calm_ttft_p99_s: float
    others_ratio: float
    unanswered: int


class PolicyResult(msgspec.Struct, frozen=True, kw_only=True):
    policy: str
    measured: Figures
    simulated: Figures
    errors: dict[str, int]
    """HTTP status or kind of failure, and how often, all spans."""
    cpu: CpuUse


class CrowdResult(msgspec.Struct, frozen=True, kw_only=True):
    options: CrowdOptions
    executor: str
    machine: Machine
    slo_ttft_s: float
    slo_tpot_s: float
    requests: int
    """In the crowd's span."""
    crowd_requests: int
    """Those of them for the crowd's adapter."""
    policies: tuple[PolicyResult, ...]


def arrivals_of(options: CrowdOptions) -> Arrivals:
    arrivals = flash_crowd(
        seed=options.seed,
        spans_s=(options.span_s,) * 3,
        ramp_s=options.ramp_s,
        crowd_factor=options.crowd_factor,
        hot_rate=options.hot_rate,
        other_rate=options.other_rate,
        num_adapters=options.adapters,
        num_tenants=options.tenants,
        prompt=options.prompt_tokens,
        output=options.output_tokens,
    )
    return within_context(arrivals)


def run_crowd_bench(options: CrowdOptions) -> CrowdResult:
    """Raises what ``start_platform`` raises."""
    arrivals, found = arrivals_of(options), []
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as folder:
        for policy in options.policies:
            router = msgspec.convert({**msgspec.to_builtins(options.setup.router), "policy": policy}, RouterConfig)
            setup = msgspec.structs.replace(options.setup, router=router)
            with tenant_platform(setup, arrivals.adapters, Path(folder), say) as platform:
                samples, cpu = platform.send(arrivals, seed=options.seed)
            result = PolicyResult(
                policy=policy,
                measured=figures_of(Outcomes.of_samples(samples), arrivals, options),
                simulated=figures_of(predicted(setup, arrivals, options.slo), arrivals, options),
                errors=error_counts(samples),
                cpu=cpu,
            )
            say(_line(result))
            found.append(result)
    crowd = arrivals.arrival_s >= 2 * options.span_s
    return CrowdResult(
        options=options,
        executor=options.setup.executor,
        machine=Machine.this(),
        slo_ttft_s=options.slo.ttft_s,
        slo_tpot_s=options.slo.tpot_s,
        requests=int(np.count_nonzero(crowd)),
        crowd_requests=int(np.count_nonzero(crowd & is_hot(arrivals))),
        policies=tuple(found),
    )


def is_hot(arrivals: Arrivals) -> npt.NDArray[np.bool_]:
    return np.array([adapter.name == HOT for adapter in arrivals.adapters])[arrivals.adapter]


def figures_of(outcomes: Outcomes, arrivals: Arrivals, options: CrowdOptions) -> Figures:
    """``outcomes`` in the order of ``arrivals``. A request without an answer has met nothing, and its TTFT is
    infinite."""
    times, hot = arrivals.arrival_s, is_hot(arrivals)
    crowd, others = times >= 2 * options.span_s, arrivals.tenant != arrivals.tenant[hot][0]
    calm = (times >= options.span_s) & ~crowd
    good = outcomes.good(options.slo)
    during_s, calm_s = (percentile(outcomes.ttft_s[others & span], 99) for span in (crowd, calm))
    return Figures(
        attainment=float(good[crowd].mean()),
        hot_attainment=float(good[crowd & hot].mean()),
        others_attainment=float(good[crowd & others].mean()),
        calm_attainment=float(good[calm].mean()),
        ttft_p50_s=percentile(outcomes.ttft_s[crowd], 50),
        ttft_p99_s=percentile(outcomes.ttft_s[crowd], 99),
        tpot_p50_s=percentile(outcomes.tpot_s[crowd], 50),
        others_ttft_p99_s=during_s,
        others_calm_ttft_p99_s=calm_s,
        others_ratio=during_s / calm_s,
        unanswered=int(np.count_nonzero(~outcomes.served)),
    )


def _line(result: PolicyResult) -> str:
    measured, simulated = result.measured, result.simulated
    return (
        f"{result.policy}: attainment {measured.attainment:.3f} (simulated {simulated.attainment:.3f}), calm "
        f"{measured.calm_attainment:.3f}; TTFT p99 {measured.ttft_p99_s:.3f} s; other tenants' TTFT p99 "
        f"{measured.others_ttft_p99_s:.3f} / {measured.others_calm_ttft_p99_s:.3f} s calm: {measured.others_ratio:.2f} "
        f"(simulated {simulated.others_ratio:.2f}); errors {result.errors}; CPU {result.cpu.machine:.0%}, ours "
        f"{result.cpu.ours:.0%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="A flash crowd for one adapter, by several routing policies.")
    parser.add_argument("policies", nargs="*", metavar="POLICY", help=f"of {', '.join(POLICIES)}; default: all")
    parser.add_argument("--gateways", type=int, default=1)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--factor", type=float, default=4.0, help="how many times slower than an H100")
    parser.add_argument("--span", type=float, default=40.0, help="seconds of each of the three spans")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file for all figures")
    given = parser.parse_args()
    unknown = [policy for policy in given.policies if policy not in POLICIES]
    if unknown:
        parser.error(f"no policy {unknown[0]!r}")
    options = CrowdOptions(
        setup=TenantSetup(replicas=given.replicas, gateways=given.gateways, factor=given.factor),
        policies=tuple(given.policies) or POLICIES,
        span_s=given.span,
        seed=given.seed,
    )
    result = run_crowd_bench(options)
    head = f"{result.executor}; {given.replicas} replicas, {given.gateways} gateways, {result.machine.cores} cores"
    report(
        msgspec.to_builtins(result),
        [head, *map(_line, result.policies)],
        cpu=max(found.cpu.machine for found in result.policies),
        out=given.out,
    )


if __name__ == "__main__":
    main()
