"""Plan changes under load: adapters move, replicas come and go, groups change their shape; requests see nothing of it.

Open-loop load all the time, one change after the other with calm between them. Called by ``loraplex bench replan`` and
by the test of plan changes.
"""

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import msgspec
import numpy as np
from loraplex.core.plan import AdapterShare, BasePlacement, GroupPlan, Plan, Shape
from loraplex.core.rollout import PlanRecord, PlanState
from loraplex.loadgen.completion import CompletionClient, Sample
from loraplex.loadgen.config import RequestConfig
from loraplex.loadgen.http_client import HttpClient
from loraplex.loadgen.prompts import RandomTokens
from loraplex.model_runner.build import load_model_spec

from loraplex_deployments.bench_cluster import BASE, MODEL, TENANT, BenchCluster, ClusterSetup, bench_cluster
from loraplex_deployments.bench_processes import CpuMeter, CpuUse

_POLL_S = 0.2
_MAX_COMPARED = 200
_COMPARED_AT_ONCE = 4
_SETTLE_TIMEOUT_S = 180.0


class Change(StrEnum):
    ADAPTERS = "adapters move"
    MORE = "a replica more"
    REGROUP = "two groups become one"
    FEWER = "back to the first groups"
    SHAPE = "all groups take the next shape"


_ROUND = (Change.ADAPTERS, Change.MORE, Change.REGROUP, Change.FEWER)
"""One after the other, without ``shapes``."""


class ReplanOptions(msgspec.Struct, frozen=True, kw_only=True):
    cluster: ClusterSetup
    changes: int = 20
    requests_per_s: float = 6.0
    prompt_tokens: int = 64
    output_tokens: int = 48
    calm_s: float = 5.0
    """Before each change: what the times during it are compared with."""
    tp: int = 2
    """Shards of the group that two others become."""
    shapes: tuple[Shape, ...] = ()
    """If given, nothing but the shape of all groups changes, to each of these in turn; the cluster has the first."""
    seed: int = 0


class ChangeResult(msgspec.Struct, frozen=True, kw_only=True):
    change: Change
    shapes: tuple[Shape, ...]
    """Of the groups from then on."""
    seconds: float
    """Until the machines were as the plan says."""
    requests: int
    """That were sent meanwhile."""
    failed: int
    ttft_max_s: float


class ReplanBenchResult(msgspec.Struct, frozen=True, kw_only=True):
    options: ReplanOptions
    executor: str
    cores: int
    cpu: CpuUse
    requests: int
    failed: int
    errors: dict[str, str]
    """Kind of failure -> its first message."""
    compared: int
    """Answers begun during changes, at most 200, for whose requests the platform was asked again when nothing changed
    any more."""
    different: int
    """Of these, answers that were other ones."""
    ttft_p99_calm_s: float
    """Over the requests sent before changes."""
    ttft_p99_change_s: float
    """Over those sent during changes."""
    ttft_p99_ratio: float
    changes: tuple[ChangeResult, ...]


def run_replan_bench(options: ReplanOptions, say: Callable[[str], None] = lambda _line: None) -> ReplanBenchResult:
    """Raises what ``start_platform`` raises."""
    with bench_cluster(options.cluster, say) as bench:
        return asyncio.run(measure_changes(bench, options, say))


def plan_of(number: int, options: ReplanOptions) -> tuple[Change, Plan]:
    """The ``number``-th change and the plan that it makes. Every adapter is on two replicas, shifted at each change."""
    change = Change.SHAPE if options.shapes else _ROUND[number % len(_ROUND)]
    shapes = [Shape()] * options.cluster.replicas
    if change is Change.SHAPE:
        shapes = [options.shapes[(number + 1) % len(options.shapes)]] * options.cluster.replicas
    elif change is Change.MORE:
        shapes.append(Shape())
    elif change is Change.REGROUP:
        shapes = [*shapes[2:], Shape(tp=options.tp)]
    groups = tuple(
        GroupPlan(
            name=f"group-{index}",
            shape=shape,
            bases=(BasePlacement(base_model_id=BASE, adapters=_adapters(index + number, len(shapes), options)),),
        )
        for index, shape in enumerate(shapes)
    )
    return change, Plan(version=number + 1, groups=groups)


def _adapters(place: int, num_groups: int, options: ReplanOptions) -> tuple[AdapterShare, ...]:
    return tuple(
        AdapterShare(tenant=str(TENANT), name=f"adapter-{index}")
        for index in range(options.cluster.adapters)
        if (index - place) % num_groups in (0, 1)
    )


async def measure_changes(
    bench: BenchCluster, options: ReplanOptions, say: Callable[[str], None] = lambda _line: None
) -> ReplanBenchResult:
    """``options.cluster`` is what ``bench`` was started with. AssertionError when a plan fails."""
    load = _Load(bench, options)
    spans: list[_Span] = []
    await load.warm_up()
    meter = CpuMeter()
    running = asyncio.create_task(load.run())
    try:
        for number in range(options.changes):
            await asyncio.sleep(options.calm_s)
            change, plan = plan_of(number, options)
            begun_s = load.now_s()
            record: PlanRecord = await asyncio.to_thread(bench.platform.call, "apply_plan", plan, renumber=True)
            await settled(bench, record.plan.version)
            shapes = tuple(group.shape for group in plan.groups)
            spans.append(_Span(change=change, shapes=shapes, begun_s=begun_s, ended_s=load.now_s()))
            say(f"{number + 1}: {change}, {load.now_s() - begun_s:.1f} s")
        cpu = meter.read()
    finally:
        await load.end(running)
    compared, different = await load.compare(spans)
    load.close()
    return _result(options, [sample for _, sample in load.sent], spans, cpu, compared=compared, different=different)


async def settled(bench: BenchCluster, version: int) -> None:
    """Returns when plan ``version`` has been reached. AssertionError when another is in force, TimeoutError."""
    async with asyncio.timeout(_SETTLE_TIMEOUT_S):
        while True:
            status = await asyncio.to_thread(bench.status)
            active = status.active
            # A controller that has just started knows what its predecessor settled before it has looked itself.
            if active.plan.version == version and active.state is PlanState.SETTLED and status.settled:
                return
            assert active.plan.version == version, f"plan {version} failed: {active}"
            await asyncio.sleep(_POLL_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Span:
    """Of one change, on the load's clock."""

    change: Change
    shapes: tuple[Shape, ...]
    begun_s: float
    ended_s: float

    def holds(self, sample: Sample) -> bool:
        return self.begun_s <= sample.scheduled_s <= self.ended_s


class _Load:
    """Poisson arrivals until it is ended, adapters in turn."""

    def __init__(self, bench: BenchCluster, options: ReplanOptions) -> None:
        self._options = options
        self._targets = bench.targets
        self._http = HttpClient(bench.url, connect_timeout_s=10)
        self._client = CompletionClient(self._http, RequestConfig(timeout_s=120))
        self._prompts = RandomTokens(load_model_spec(MODEL, BASE).vocab_size, seed=options.seed)
        self._numbers = random.Random(options.seed)
        self._origin_s = time.perf_counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._index = 0
        self.sent: list[tuple[int, Sample]] = []
        """With the number of the request."""

    def now_s(self) -> float:
        return time.perf_counter() - self._origin_s

    async def warm_up(self) -> None:
        """Each adapter once; not counted."""
        await asyncio.gather(*(self._send(index, self.now_s()) for index in range(len(self._targets))))

    async def run(self) -> None:
        at_s = self.now_s()
        while True:
            at_s += self._numbers.expovariate(self._options.requests_per_s)
            await asyncio.sleep(max(0.0, at_s - self.now_s()))
            task = asyncio.create_task(self._count(self._send(self._index, at_s)))
            self._index += 1
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def end(self, running: "asyncio.Task[None]") -> None:
        """Nothing more is sent; what was sent is awaited."""
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await asyncio.gather(*self._tasks)

    async def compare(self, spans: Sequence[_Span]) -> tuple[int, int]:
        """Sends requests of the ``spans`` again, a few at a time; how many, and how many were answered otherwise."""
        chosen = [(i, s) for i, s in self.sent if s.error is None and any(span.holds(s) for span in spans)]
        turns = asyncio.Semaphore(_COMPARED_AT_ONCE)

        async def differs(index: int, first: Sample) -> bool:
            async with turns:
                return (await self._send(index, self.now_s()))[1].text != first.text

        found = await asyncio.gather(*(differs(index, sample) for index, sample in chosen[:_MAX_COMPARED]))
        return len(found), sum(found)

    def close(self) -> None:
        self._http.close()

    async def _count(self, sending: Awaitable[tuple[int, Sample]]) -> None:
        self.sent.append(await sending)

    async def _send(self, index: int, at_s: float) -> tuple[int, Sample]:
        options = self._options
        target = self._targets[index % len(self._targets)]
        data = self._client.encode(target, self._prompts.make(index, options.prompt_tokens), options.output_tokens)
        sample = await self._client.run(
            data, target=target, origin_s=self._origin_s, scheduled_s=at_s, prompt_tokens=options.prompt_tokens
        )
        return index, sample


def _result(
    options: ReplanOptions, samples: list[Sample], spans: list[_Span], cpu: CpuUse, *, compared: int, different: int
) -> ReplanBenchResult:
    during = [[sample for sample in samples if span.holds(sample)] for span in spans]
    calm = [
        sample
        for sample in samples
        if any(span.begun_s - options.calm_s <= sample.scheduled_s < span.begun_s for span in spans)
    ]
    calm_s = _p99(calm)
    change_s = _p99([sample for part in during for sample in part])
    failed = [sample for sample in samples if sample.error is not None]
    return ReplanBenchResult(
        options=options,
        executor=options.cluster.executor,
        cores=os.cpu_count() or 1,
        cpu=cpu,
        requests=len(samples),
        failed=len(failed),
        errors={str(sample.error): sample.message for sample in reversed(failed)},
        compared=compared,
        different=different,
        ttft_p99_calm_s=calm_s,
        ttft_p99_change_s=change_s,
        ttft_p99_ratio=change_s / calm_s,
        changes=tuple(
            ChangeResult(
                change=span.change,
                shapes=span.shapes,
                seconds=span.ended_s - span.begun_s,
                requests=len(part),
                failed=sum(sample.error is not None for sample in part),
                ttft_max_s=max(map(_ttft_s, part), default=0.0),
            )
            for span, part in zip(spans, during, strict=True)
        ),
    )


def _ttft_s(sample: Sample) -> float:
    """Infinite without a token."""
    return float("inf") if sample.first_token_s is None else sample.first_token_s - sample.scheduled_s


def _p99(samples: list[Sample]) -> float:
    return float(np.percentile([_ttft_s(sample) for sample in samples], 99)) if samples else 0.0
