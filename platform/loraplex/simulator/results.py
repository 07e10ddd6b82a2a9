"""Turns what happened to each request into the figures of a ``SimulationResult``. Called by both simulators.

``tenant_scores`` and ``adapter_scores`` give full figures per tenant and adapter of a result.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loraplex.simulator.cluster import Cluster
from loraplex.simulator.types import (
    FloatArray,
    GroupUse,
    IntArray,
    Outcome,
    Score,
    SimulationInput,
    SimulationResult,
)
from loraplex.simulator.workload import Workload
from loraplex.traces.arrivals import Arrivals

_PERCENTILES = (50, 90, 99)
_Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Happened:
    """R requests on P replicas."""

    first_s: FloatArray
    """[R] time of the first token; infinite for those not served."""
    end_s: FloatArray
    """[R] time of the last one; infinite likewise."""
    num_output: IntArray
    """[R] tokens that were generated."""
    outcome: npt.NDArray[np.int8]
    replica: IntArray
    """[R] that served it; -1: none."""
    busy_s: FloatArray
    """[P]"""
    num_steps: npt.NDArray[np.int64]
    num_preemptions: npt.NDArray[np.int64]
    num_loads: npt.NDArray[np.int64]
    load_bytes: FloatArray
    """[P] per GPU."""


def result_of(given: SimulationInput, workload: Workload, cluster: Cluster, happened: Happened) -> SimulationResult:
    arrivals = workload.arrivals
    served = happened.outcome == Outcome.SERVED
    ttft_s = happened.first_s - arrivals.arrival_s + given.overhead_s
    # Of one token: 0 / 1; of requests that were not served: infinite.
    with np.errstate(invalid="ignore"):
        tpot_s = np.where(served, (happened.end_s - happened.first_s) / np.maximum(happened.num_output - 1, 1), np.inf)
    good = served & (ttft_s <= cluster.slo_ttft_s) & (tpot_s <= cluster.slo_tpot_s)
    group_of = np.array([replica.group for replica in cluster.replicas], dtype=np.int32)
    group = np.where(happened.replica >= 0, group_of[happened.replica], -1).astype(np.int32)
    end_s = float(np.max(happened.end_s[served], initial=arrivals.arrival_s[-1]))
    groups = _groups(given, group_of, group, happened)
    num_gpus = sum(use.num_gpus for use in groups)
    busy_s = sum(use.busy_s * use.num_gpus for use in groups)
    scored = scored_mask(given, arrivals)
    fields = _Fields(ttft_s=ttft_s, tpot_s=tpot_s, served=served, good=good, cluster=cluster, arrivals=arrivals)
    return SimulationResult(
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        outcome=happened.outcome,
        group=group,
        good=good,
        groups=groups,
        end_s=end_s,
        gpu_use=busy_s / (num_gpus * end_s) if end_s > 0 else 0.0,
        score=_score(fields, scored, scored_span_s(given, arrivals)),
        tenant_attainment=_shares(arrivals.tenant, good, scored, len(arrivals.tenants)),
        adapter_attainment=_shares(arrivals.adapter, good, scored, len(arrivals.adapters)),
    )


def tenant_scores(given: SimulationInput, result: SimulationResult, cluster: Cluster) -> Mapping[str, Score]:
    """By tenant, of those with a request in the scored span."""
    arrivals = given.arrivals
    return _scores(given, result, cluster, arrivals.tenant, list(arrivals.tenants))


def adapter_scores(given: SimulationInput, result: SimulationResult, cluster: Cluster) -> Mapping[str, Score]:
    """By adapter: ``tenant/name``, ``name`` where there is no tenant, with ``@base`` where two would be alike."""
    arrivals = given.arrivals
    names = [a.name if a.tenant is None else f"{a.tenant}/{a.name}" for a in arrivals.adapters]
    alike = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    labels = [f"{n}@{a.base_model}" if n in alike else n for n, a in zip(names, arrivals.adapters, strict=True)]
    return _scores(given, result, cluster, arrivals.adapter, labels)


def scored_mask(given: SimulationInput, arrivals: Arrivals) -> _Mask:
    mask: _Mask = (arrivals.arrival_s >= given.score_from_s) & (arrivals.arrival_s < given.score_until_s)
    return mask


def scored_span_s(given: SimulationInput, arrivals: Arrivals) -> float:
    """From the first to the last moment that counts."""
    until_s = min(given.score_until_s, float(arrivals.arrival_s[-1]))
    return max(0.0, until_s - max(given.score_from_s, float(arrivals.arrival_s[0])))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fields:
    ttft_s: FloatArray
    tpot_s: FloatArray
    served: _Mask
    good: _Mask
    cluster: Cluster
    arrivals: Arrivals


def _groups(given: SimulationInput, group_of: IntArray, group: IntArray, happened: Happened) -> tuple[GroupUse, ...]:
    num_groups = len(given.plan.groups)
    requests = np.bincount(group[group >= 0], minlength=num_groups)

    def total(values: npt.NDArray[np.generic]) -> FloatArray:
        return np.bincount(group_of, weights=values.astype(np.float64), minlength=num_groups).astype(np.float64)

    busy_s, steps = total(happened.busy_s), total(happened.num_steps)
    preemptions, loads, load_bytes = map(total, (happened.num_preemptions, happened.num_loads, happened.load_bytes))
    return tuple(
        GroupUse(
            name=planned.name,
            num_gpus=planned.shape.num_ranks,
            busy_s=float(busy_s[index]),
            num_steps=int(steps[index]),
            num_requests=int(requests[index]),
            num_preemptions=int(preemptions[index]),
            num_loads=int(loads[index]),
            load_bytes=int(load_bytes[index]),
        )
        for index, planned in enumerate(given.plan.groups)
    )


def _scores(
    given: SimulationInput, result: SimulationResult, cluster: Cluster, owner: IntArray, labels: list[str]
) -> dict[str, Score]:
    arrivals = given.arrivals
    fields = _Fields(
        ttft_s=result.ttft_s,
        tpot_s=result.tpot_s,
        served=result.outcome == Outcome.SERVED,
        good=result.good,
        cluster=cluster,
        arrivals=arrivals,
    )
    rows = np.flatnonzero(scored_mask(given, arrivals) & (owner >= 0))
    rows = rows[np.argsort(owner[rows], kind="stable")]
    found, first = np.unique(owner[rows], return_index=True)
    span_s = scored_span_s(given, arrivals)
    return {
        labels[index]: _score(fields, part, span_s)
        for index, part in zip(found.tolist(), np.split(rows, first[1:]), strict=True)
    }


def _score(fields: _Fields, chosen: npt.NDArray[np.generic], span_s: float) -> Score:
    """``chosen``: a mask or indices."""
    served = fields.served[chosen]
    ttft_s, tpot_s = fields.ttft_s[chosen], fields.tpot_s[chosen]
    count, num_good = len(served), int(np.count_nonzero(fields.good[chosen]))
    several = served & (fields.arrivals.output_tokens[chosen] > 1)

    def share(met: _Mask) -> float:
        return float(np.count_nonzero(met) / count) if count else float("nan")

    return Score(
        num_requests=count,
        num_good=num_good,
        num_served=int(np.count_nonzero(served)),
        attainment=num_good / count if count else float("nan"),
        ttft_attainment=share(served & (ttft_s <= fields.cluster.slo_ttft_s[chosen])),
        tpot_attainment=share(served & (tpot_s <= fields.cluster.slo_tpot_s[chosen])),
        goodput_per_s=num_good / span_s if span_s > 0 else float("nan"),
        ttft_s=_distribution(ttft_s[served]),
        tpot_s=_distribution(tpot_s[several]),
    )


def _distribution(values: FloatArray) -> dict[str, float]:
    names = [f"p{percentile}" for percentile in _PERCENTILES]
    if not len(values):
        return dict.fromkeys([*names, "mean"], float("nan"))
    found = np.percentile(values, _PERCENTILES)
    return {**dict(zip(names, found.tolist(), strict=True)), "mean": float(np.mean(values))}


def _shares(owner: IntArray, good: _Mask, scored: _Mask, count: int) -> FloatArray:
    """[count] good share of the scored requests of each owner."""
    chosen = scored & (owner >= 0)
    requests = np.bincount(owner[chosen], minlength=count).astype(np.float64)
    met = np.bincount(owner[chosen], weights=good[chosen].astype(np.float64), minlength=count)
    with np.errstate(invalid="ignore"):
        return met / requests
