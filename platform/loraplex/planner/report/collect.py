"""Scores a plan and what it is compared with, on the planning trace or another window. Pure."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from loraplex.planner.baselines import Baseline
from loraplex.planner.bound import gpus_bound
from loraplex.planner.capacity import capacities, demands
from loraplex.planner.problem import Problem, kinds
from loraplex.planner.report.values import AdapterUse, PlanReport, PolicyScore
from loraplex.planner.sample import sampled
from loraplex.planner.search import Found
from loraplex.simulator import fast
from loraplex.simulator.cluster import Cluster
from loraplex.simulator.types import FloatArray, Outcome, SimulationInput, SimulationResult
from loraplex.simulator.workload import Workload
from loraplex.traces.arrivals import Arrivals

SLO_SCALES = (0.25, 0.354, 0.5, 0.707, 1.0, 1.414, 2.0, 2.828, 4.0)
RATE_FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
_MAX_CURVE_REQUESTS = 20_000
"""Simulated for each policy and rate factor."""


def reported(
    problem: Problem,
    found: Found,
    compared: tuple[Baseline, ...],
    scored_on: Arrivals | None = None,
    *,
    parts: int = 60,
    rate_factors: Sequence[float] = (),
) -> PlanReport:
    """``scored_on``: another window with the same tables of names; None: the planning trace. ``parts``: of the
    timeline. ``rate_factors``: each costs a simulation of up to 20,000 requests for every policy."""
    arrivals = problem.arrivals if scored_on is None else scored_on
    workload = Workload.of(arrivals, problem.adapters)
    span_s = max(float(arrivals.arrival_s[-1] - arrivals.arrival_s[0]), 1e-9)
    edges_s = float(arrivals.arrival_s[0]) + np.arange(parts + 1) * span_s / parts
    part = np.clip(np.searchsorted(edges_s, arrivals.arrival_s, side="right") - 1, 0, parts - 1)
    counts = np.bincount(part, minlength=parts)
    faster = _Faster(problem, sampled(arrivals, _MAX_CURVE_REQUESTS), rate_factors)
    own = fast.simulate(problem.simulation(found.plan, arrivals), workload)
    policies = []
    for baseline in (None, *compared):
        plan = found.plan if baseline is None else baseline.plan
        given = problem.simulation(plan, arrivals)
        result = own if baseline is None else fast.simulate(given, workload)
        good = np.bincount(part, weights=result.good.astype(np.float64), minlength=parts)
        policies.append(
            PolicyScore(
                policy="loraplex" if baseline is None else baseline.name,
                setting="" if baseline is None else baseline.setting,
                planned=found.sample_attainment if baseline is None else baseline.attainment,
                score=result.score,
                is_alpaserve=baseline is not None and baseline.is_alpaserve,
                by_slo=_by_slo(given, workload, result),
                by_rate=faster.attainments(given),
                timeline=tuple(np.where(counts > 0, good / np.maximum(counts, 1), np.nan).tolist()),
            )
        )
    worst = [(name, float(value)) for name, value in zip(arrivals.tenants, own.tenant_attainment, strict=True)]
    capacity = capacities(problem, kinds(problem), demands(problem))
    return PlanReport(
        plan=found.plan,
        found=found,
        nodes=problem.nodes,
        score=own.score,
        groups=own.groups,
        end_s=own.end_s,
        tenants=dict(sorted((pair for pair in worst if not np.isnan(pair[1])), key=lambda pair: pair[1])),
        adapters=_adapters(problem.simulation(found.plan, arrivals), own),
        policies=tuple(policies),
        gpus_bound=gpus_bound(problem, capacity, 0.99),
        slo_scales=SLO_SCALES,
        rate_factors=tuple(rate_factors),
        timeline_s=tuple(edges_s[:-1].tolist()),
        requests_per_s=tuple((counts * parts / span_s).tolist()),
        in_flight=tuple(tuple(row) for row in _in_flight(arrivals, own, edges_s).tolist()),
    )


class _Faster:
    """The same requests in less time, or more."""

    def __init__(self, problem: Problem, arrivals: Arrivals, factors: Sequence[float]) -> None:
        changed = [replace(arrivals, arrival_s=arrivals.arrival_s / factor) for factor in factors]
        self._traces = [(one, Workload.of(one, problem.adapters)) for one in changed]

    def attainments(self, given: SimulationInput) -> tuple[float, ...]:
        return tuple(
            fast.simulate(replace(given, arrivals=arrivals), workload).score.attainment
            for arrivals, workload in self._traces
        )


def _by_slo(given: SimulationInput, workload: Workload, result: SimulationResult) -> tuple[float, ...]:
    """Targets change who is served well, not how: one simulation answers for all of them."""
    cluster = Cluster.of(given, workload)
    served = result.outcome == Outcome.SERVED
    return tuple(
        float(
            np.mean(
                served & (result.ttft_s <= scale * cluster.slo_ttft_s) & (result.tpot_s <= scale * cluster.slo_tpot_s)
            )
        )
        for scale in SLO_SCALES
    )


def _in_flight(arrivals: Arrivals, result: SimulationResult, edges_s: FloatArray) -> FloatArray:
    """[G, T] mean number of requests between arrival and last token."""
    served = np.flatnonzero(np.isfinite(result.ttft_s) & np.isfinite(result.tpot_s))
    start_s, group = arrivals.arrival_s[served], result.group[served]
    end_s = start_s + result.ttft_s[served] + result.tpot_s[served] * np.maximum(arrivals.output_tokens[served] - 1, 0)
    found = np.zeros((len(result.groups), len(edges_s) - 1))
    for index in range(len(result.groups)):
        rows = group == index
        spent_s = _spent_until(np.sort(start_s[rows]), edges_s) - _spent_until(np.sort(end_s[rows]), edges_s)
        found[index] = np.maximum(np.diff(spent_s), 0.0) / np.diff(edges_s)
    return found


def _spent_until(starts_s: FloatArray, edges_s: FloatArray) -> FloatArray:
    """[edges] seconds, over all ``starts_s`` (ascending), from the start to the edge."""
    before = np.searchsorted(starts_s, edges_s)
    spent_s: FloatArray = before * edges_s - np.concatenate([[0.0], np.cumsum(starts_s)])[before]
    return spent_s


def _adapters(given: SimulationInput, result: SimulationResult) -> tuple[AdapterUse, ...]:
    arrivals, names = given.arrivals, [group.name for group in given.plan.groups]
    listed: dict[tuple[str, str | None, str], list[str]] = {}
    for group in given.plan.groups:
        for placed in group.bases:
            for share in placed.adapters:
                listed.setdefault((placed.base_model_id, share.tenant, share.name), []).append(group.name)
    rows = (arrivals.adapter >= 0) & (result.group >= 0)
    cells = arrivals.adapter[rows].astype(np.int64) * len(names) + result.group[rows]
    served = np.bincount(cells, minlength=len(arrivals.adapters) * len(names)).reshape(-1, len(names))
    requests = np.bincount(arrivals.adapter[arrivals.adapter >= 0], minlength=len(arrivals.adapters))
    found = []
    for index in np.argsort(-requests, kind="stable").tolist():
        adapter = arrivals.adapters[index]
        found.append(
            AdapterUse(
                tenant=adapter.tenant,
                base_model=adapter.base_model,
                name=adapter.name,
                requests=int(requests[index]),
                attainment=float(result.adapter_attainment[index]),
                groups=tuple(listed.get((adapter.base_model or "", adapter.tenant, adapter.name), ())),
                served_by={names[g]: int(served[index, g]) for g in np.flatnonzero(served[index]).tolist()},
            )
        )
    return tuple(found)
