"""Drifting popularity: the best plan that stays against plans that follow the traffic.

The same arrivals twice on one platform. First with the planner's plan for the whole trace, which knows what will come;
then from that plan on with the controller's own loop, which knows what was recorded. Popularity rotates over bases and
adapters. Called by ``loraplex bench drift``.
"""

import asyncio
import contextlib
import dataclasses
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
from loraplex.bench.commit import source_commit
from loraplex.bench.fleet.prepared import groups_line
from loraplex.controller.fleet.replan import problem_for
from loraplex.core.plan import Plan
from loraplex.core.rollout import DecisionKind, DecisionRecord, PlanRecord
from loraplex.loadgen.completion import Sample
from loraplex.loadgen.outcomes import Outcomes, percentile
from loraplex.planner.chance import paired_interval
from loraplex.planner.search import Search
from loraplex.traces.arrivals import AdapterName, Arrivals, TraceRequest, requests_of
from loraplex.traces.synth.arrivals import synthetic_arrivals
from loraplex.traces.synth.recipe import Drift, Recipe

from loraplex_deployments.replan_platform import ReplanPlatform, decision_line, planner_task
from loraplex_deployments.replan_setup import TENANT, ReplanSetup

_PRIME_GAP_S = 0.1
_PRIME_TOKENS = (32, 2)
"""Prompt and output tokens of the request of each adapter before a run, which does not count."""
_SEARCHES = 3
_BOTH_SEEDS = (1, 2)
"""Of the prompts: no KV of the first run is of use in the second."""


class DriftOptions(msgspec.Struct, frozen=True, kw_only=True):
    setup: ReplanSetup
    rotate_s: float = 120.0
    """Popularity moves on after so long: to the next base, and within it to other adapters."""
    phases: int = 3
    """Of ``rotate_s`` each."""
    rate: float = 10.0
    """Requests per second, all together."""
    cv: float = 1.0
    """Of the gaps of an adapter."""
    skew: float = 1.0
    """Adapter of rank i is asked (i + 1) ** -skew as often as the first."""
    lengths: str = "lognormal:800,0.5,24,0.5"
    """Of prompts and outputs, as ``traces.synth`` takes them."""
    max_prompt_tokens: int = 1536
    max_output_tokens: int = 256
    evaluations: int = 400
    """Of the search for the plan that stays."""
    seed: int = 0


class PlanChange(msgspec.Struct, frozen=True, kw_only=True):
    at_s: float
    """Since the run began."""
    seconds: float | None
    """Until the machines were as the plan says; None: not before the run ended."""
    groups: str
    predicted_gain: float | None


class DriftRun(msgspec.Struct, frozen=True, kw_only=True):
    """One way to plan."""

    requests: int
    failed: int
    errors: dict[str, int]
    """First message of each kind of failure -> how often."""
    attainment: float
    attainment_by_phase: tuple[float, ...]
    ttft_p50_s: float
    """Infinite with as many requests unanswered."""
    ttft_p99_s: float
    tpot_p50_s: float
    tpot_p99_s: float
    late_p99_s: float
    """How much later than due the sender was."""
    changes: tuple[PlanChange, ...]
    """Of groups; adapters move besides."""
    decisions: tuple[str, ...]
    """All of the controller, in order."""


class DriftResult(msgspec.Struct, frozen=True, kw_only=True):
    options: DriftOptions
    executor: str
    gpus: str
    cores: int
    commit: str | None
    share_by_phase: tuple[tuple[float, ...], ...]
    """Of the requests, by base."""
    static_plan: str
    static_predicted: float
    """Attainment over the whole trace, as the planner's simulator says."""
    static: DriftRun
    live: DriftRun
    gain: float
    """Attainment of the live run less that of the static one."""
    gain_interval: tuple[float, float]
    """95 % of a bootstrap over the requests, in pairs."""


def run_drift_bench(options: DriftOptions, say: Callable[[str], None] = lambda _line: None) -> DriftResult:
    """Raises what ``start_platform`` raises; errors of the planner and of the recipe."""
    setup = options.setup
    arrivals = drift_arrivals(options)
    with contextlib.ExitStack() as stack:
        # While the platform starts. It compiles the simulator, also for the controller's planner.
        planned = stack.enter_context(ThreadPoolExecutor(1)).submit(static_plan, options, arrivals)
        platform = ReplanPlatform.start(say, mode="off", setup=setup, plan=lambda: planned.result()[0])
        stack.callback(platform.close)
        plan, predicted = planned.result()
        say(f"{len(arrivals)} requests; the plan that stays: {groups_line(plan)}, {predicted:.3f} predicted")
        runs, outcomes = [], []
        for mode, seed in zip(("off", "auto"), _BOTH_SEEDS, strict=True):
            if mode == "auto":
                platform.set_mode("auto")
            run, outcome = _measured(platform, options, arrivals, seed=seed)
            runs.append(run)
            outcomes.append(outcome)
            say(f"{mode}: attainment {run.attainment:.3f}, {run.failed} failed, {len(run.changes)} changes")
    static, live = runs
    good = [outcome.good(setup.slo) for outcome in outcomes]
    return DriftResult(
        options=options,
        executor=setup.executor,
        gpus=f"{setup.nodes * setup.gpus_per_node} x {setup.gpu}",
        cores=os.cpu_count() or 1,
        commit=source_commit(),
        share_by_phase=_shares(options, arrivals),
        static_plan=groups_line(plan),
        static_predicted=predicted,
        static=static,
        live=live,
        gain=live.attainment - static.attainment,
        gain_interval=paired_interval(good[1], good[0], seed=options.seed),
    )


def drift_arrivals(options: DriftOptions) -> Arrivals:
    """In each phase the adapters of another base come first in popularity, and within a base other ones."""
    setup = options.setup
    per_base = setup.adapters_per_base
    recipe = Recipe(
        adapters=per_base * len(setup.bases),
        rate=options.rate,
        duration_s=options.rotate_s * options.phases,
        cv=options.cv,
        skew=options.skew,
        drift=Drift(every_s=options.rotate_s, shift=per_base + max(1, per_base // 8)),
        lengths=options.lengths,
        max_prompt_tokens=options.max_prompt_tokens,
        max_output_tokens=options.max_output_tokens,
        seed=options.seed,
    )
    arrivals = synthetic_arrivals(recipe)
    bases = tuple(base.name for base in setup.bases)
    known = [(base, name) for base in bases for name in setup.adapter_names[base]]
    places = [int(adapter.name.rpartition("-")[2]) for adapter in arrivals.adapters]
    base_of = np.array([place // per_base for place in places], dtype=np.int32)
    return dataclasses.replace(
        arrivals,
        adapters=tuple(AdapterName(str(TENANT), *known[place]) for place in places),
        base_models=bases,
        base_model=base_of[arrivals.adapter],
        tenants=(str(TENANT),),
        tenant=np.zeros(len(arrivals), dtype=np.int32),
    )


def static_plan(options: DriftOptions, arrivals: Arrivals) -> tuple[Plan, float]:
    """The best that the planner finds for the whole trace in several searches, and its simulated attainment."""
    setup = options.setup
    with tempfile.TemporaryDirectory() as folder:
        problem = problem_for(planner_task(setup, setup.planning_in(Path(folder))), arrivals)
    searches = [Search(problem, evaluations=options.evaluations, seed=options.seed + turn) for turn in range(_SEARCHES)]
    found = max((search.run() for search in searches), key=lambda one: one.attainment)
    return found.plan, found.attainment


def _measured(
    platform: ReplanPlatform, options: DriftOptions, arrivals: Arrivals, *, seed: int
) -> tuple[DriftRun, Outcomes]:
    """Every adapter is asked once before."""
    asyncio.run(platform.replay(_primes(options.setup), seed=len(arrivals) + seed))
    begun_s = time.time()
    samples = asyncio.run(platform.replay(requests_of(arrivals), seed=seed))
    ended_s = time.time()
    samples.sort(key=lambda sample: (sample.scheduled_s, sample.target.model))
    outcomes = Outcomes.of_samples(samples)
    decisions = [one for one in platform.decisions(begun_s) if one.at_s <= ended_s]
    return _run(options, samples, outcomes, _changes(platform, decisions, begun_s), decisions), outcomes


def _primes(setup: ReplanSetup) -> list[TraceRequest]:
    prompt, output = _PRIME_TOKENS
    names = [(base, name) for base, names in setup.adapter_names.items() for name in names]
    return [
        TraceRequest(
            arrival_s=_PRIME_GAP_S * index,
            tenant=str(TENANT),
            base_model=base,
            adapter=name,
            prompt_tokens=prompt,
            output_tokens=output,
        )
        for index, (base, name) in enumerate(names)
    ]


def _changes(platform: ReplanPlatform, decisions: Sequence[DecisionRecord], begun_s: float) -> tuple[PlanChange, ...]:
    found = []
    for one in decisions:
        if one.kind is not DecisionKind.APPLIED:
            continue
        record: PlanRecord = platform.platform.call("plan_record", one.plan_version)
        settled = (
            later.at_s - one.at_s
            for later in decisions
            if later.kind is DecisionKind.SETTLED and later.plan_version == one.plan_version
        )
        found.append(
            PlanChange(
                at_s=one.at_s - begun_s,
                seconds=next(settled, None),
                groups=groups_line(record.plan),
                predicted_gain=one.predicted_gain,
            )
        )
    return tuple(found)


def _run(
    options: DriftOptions,
    samples: list[Sample],
    outcomes: Outcomes,
    changes: tuple[PlanChange, ...],
    decisions: Sequence[DecisionRecord],
) -> DriftRun:
    good = outcomes.good(options.setup.slo)
    phase = (outcomes.at_s / options.rotate_s).astype(np.int64)
    failed = [sample for sample in samples if sample.error is not None]
    return DriftRun(
        requests=len(samples),
        failed=len(failed),
        errors=Counter(sample.message for sample in failed),
        attainment=float(good.mean()),
        attainment_by_phase=tuple(float(good[phase == one].mean()) for one in range(options.phases)),
        ttft_p50_s=percentile(outcomes.ttft_s, 50),
        ttft_p99_s=percentile(outcomes.ttft_s, 99),
        tpot_p50_s=percentile(outcomes.tpot_s, 50),
        tpot_p99_s=percentile(outcomes.tpot_s, 99),
        late_p99_s=float(np.percentile([sample.sent_s - sample.scheduled_s for sample in samples], 99)),
        changes=changes,
        decisions=tuple(map(decision_line, decisions)),
    )


def _shares(options: DriftOptions, arrivals: Arrivals) -> tuple[tuple[float, ...], ...]:
    phase = (arrivals.arrival_s / options.rotate_s).astype(np.int64)
    return tuple(
        tuple(float((arrivals.base_model[phase == one] == base).mean()) for base in range(len(arrivals.base_models)))
        for one in range(options.phases)
    )
