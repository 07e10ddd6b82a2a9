"""Samples in, figures out. Pure. Called by the CLI, which prints them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loraplex.loadgen.completion import Sample
from loraplex.loadgen.outcomes import Attainment, Outcomes, attainment
from loraplex.simulator.types import Slo


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Seconds over ``count`` values."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetReport:
    tenant: str
    model: str
    requests: int
    errors: int
    output_tokens: int
    ttft_s: Latency | None
    tpot_s: Latency | None
    e2e_s: Latency | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantReport:
    tenant: str
    requests: int
    errors: int
    output_tokens: int
    ttft_s: Latency | None
    tpot_s: Latency | None
    e2e_s: Latency | None
    slo: Attainment | None
    """None: no targets were given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """Latencies are of complete answers only and count from the scheduled time; errors are counted beside them."""

    requests: int
    completed: int
    errors: dict[str, int]
    """By HTTP status or kind; see ``Sample.error``."""
    error_examples: dict[str, str]
    """The first message of each."""
    duration_s: float
    """First scheduled time to last end."""
    offered_rate_per_s: float | None
    """Scheduled requests per second; None with fewer than two."""
    completed_rate_per_s: float
    prompt_tokens: int
    """Of complete answers, as the next."""
    output_tokens: int
    output_tokens_per_s: float
    ttft_s: Latency | None
    tpot_s: Latency | None
    """(E2E - TTFT) / (tokens - 1), per answer of two tokens or more."""
    itl_s: Latency | None
    """Between chunks with text, over all answers."""
    e2e_s: Latency | None
    send_lag_s: Latency | None
    """How much later than scheduled the generator sent: its own fault, and part of every latency above."""
    client_cpu_s: float
    """CPU time of the generator's process during the run."""
    client_cpu_ms_per_token: float | None
    peak_streams: int
    """Requests that were open at the same time, at most."""
    slo: Attainment | None
    """None: no targets were given."""
    tenants: tuple[TenantReport, ...]
    """Busiest first, as the next."""
    targets: tuple[TargetReport, ...]


def summarize(samples: Sequence[Sample], *, client_cpu_s: float, slo: Slo | None = None) -> LoadReport:
    """Figures of a run; ``slo``: what each request should keep."""
    good = [sample for sample in samples if sample.error is None]
    failed = sorted((sample for sample in samples if sample.error is not None), key=lambda sample: sample.end_s)
    examples: dict[str, str] = {}
    for sample in failed:
        examples.setdefault(str(sample.error), sample.message)
    scheduled_s = [sample.scheduled_s for sample in samples]
    start_s = min(scheduled_s, default=0.0)
    span_s = max(scheduled_s, default=0.0) - start_s
    duration_s = max((sample.end_s for sample in samples), default=0.0) - start_s
    output_tokens = sum(sample.output_tokens for sample in good)
    return LoadReport(
        requests=len(samples),
        completed=len(good),
        errors=dict(sorted(Counter(str(sample.error) for sample in failed).items())),
        error_examples=examples,
        duration_s=duration_s,
        offered_rate_per_s=(len(samples) - 1) / span_s if span_s > 0 else None,
        completed_rate_per_s=len(good) / duration_s if duration_s > 0 else 0.0,
        prompt_tokens=sum(sample.prompt_tokens for sample in good),
        output_tokens=output_tokens,
        output_tokens_per_s=output_tokens / duration_s if duration_s > 0 else 0.0,
        ttft_s=_latency(_ttft_s(good)),
        tpot_s=_latency(_tpot_s(good)),
        itl_s=_latency([gap_s for sample in good for gap_s in sample.gaps_s]),
        e2e_s=_latency(_e2e_s(good)),
        send_lag_s=_latency([sample.sent_s - sample.scheduled_s for sample in samples]),
        client_cpu_s=client_cpu_s,
        client_cpu_ms_per_token=1000 * client_cpu_s / output_tokens if output_tokens else None,
        peak_streams=_peak_streams(samples),
        slo=None if slo is None else attainment(Outcomes.of_samples(samples), slo),
        tenants=_by_tenant(samples, slo),
        targets=_by_target(samples),
    )


def _by_tenant(samples: Sequence[Sample], slo: Slo | None) -> tuple[TenantReport, ...]:
    outcomes = Outcomes.of_samples(samples)
    groups: dict[str, list[Sample]] = {tenant: [] for tenant in outcomes.tenants}
    for sample in samples:
        groups[sample.target.tenant].append(sample)
    reports = []
    for index, (tenant, group) in enumerate(groups.items()):
        good = [sample for sample in group if sample.error is None]
        reports.append(
            TenantReport(
                tenant=tenant,
                requests=len(group),
                errors=len(group) - len(good),
                output_tokens=sum(sample.output_tokens for sample in good),
                ttft_s=_latency(_ttft_s(good)),
                tpot_s=_latency(_tpot_s(good)),
                e2e_s=_latency(_e2e_s(good)),
                slo=None if slo is None else attainment(outcomes, slo, outcomes.tenant == index),
            )
        )
    return tuple(sorted(reports, key=lambda report: (-report.requests, report.tenant)))


def _peak_streams(samples: Sequence[Sample]) -> int:
    events = sorted([(sample.sent_s, 1) for sample in samples] + [(sample.end_s, -1) for sample in samples])
    return int(np.cumsum([0, *(change for _, change in events)]).max())


def _by_target(samples: Sequence[Sample]) -> tuple[TargetReport, ...]:
    groups: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.target.tenant, sample.target.model), []).append(sample)
    reports = []
    for (tenant, model), group in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        good = [sample for sample in group if sample.error is None]
        reports.append(
            TargetReport(
                tenant=tenant,
                model=model,
                requests=len(group),
                errors=len(group) - len(good),
                output_tokens=sum(sample.output_tokens for sample in good),
                ttft_s=_latency(_ttft_s(good)),
                tpot_s=_latency(_tpot_s(good)),
                e2e_s=_latency(_e2e_s(good)),
            )
        )
    return tuple(reports)


def _ttft_s(samples: Sequence[Sample]) -> list[float]:
    return [sample.first_token_s - sample.scheduled_s for sample in samples if sample.first_token_s is not None]


def _tpot_s(samples: Sequence[Sample]) -> list[float]:
    return [
        (sample.end_s - sample.first_token_s) / (sample.output_tokens - 1)
        for sample in samples
        if sample.first_token_s is not None and sample.output_tokens > 1
    ]


def _e2e_s(samples: Sequence[Sample]) -> list[float]:
    return [sample.end_s - sample.scheduled_s for sample in samples]


def _latency(values: Sequence[float]) -> Latency | None:
    if not values:
        return None
    array = np.asarray(values, dtype=np.float64)
    p50, p90, p95, p99 = (float(value) for value in np.percentile(array, (50, 90, 95, 99)))
    return Latency(
        count=len(array), mean=float(array.mean()), p50=p50, p90=p90, p95=p95, p99=p99, max=float(array.max())
    )
