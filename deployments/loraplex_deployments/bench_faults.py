"""Open streams while processes are killed: are they broken, do they say the same, how long were they silent.

Called by ``loraplex bench faults`` and by the fault test.
"""

import asyncio
import contextlib
import itertools
import os
import random
import time
from collections.abc import Callable, Sequence
from enum import StrEnum

import msgspec
import ray
from loraplex.model_runner.build import load_model_spec

from loraplex_deployments.bench_cluster import BASE, MODEL, BenchCluster, ClusterSetup, bench_cluster, node_name
from loraplex_deployments.bench_processes import CpuMeter, CpuUse
from loraplex_deployments.bench_streams import StreamWatch, WatchedStream, same_request

_PROMPT_TOKENS = 24
_POLL_S = 0.05
_PIECES_BEFORE = 5
"""Each stream has said so much before anything is killed."""


class Fault(StrEnum):
    """What is killed, by SIGKILL unless it says otherwise."""

    REPLICA = "replica"
    NODE = "node"
    """All of a worker node: Ray's daemons, and the replicas on it."""
    CONTROLLER = "controller"
    SERVE_CONTROLLER = "serve-controller"
    GATEWAY = "gateway"
    RANK = "rank"
    """Of the busiest replica, one of several ranks that compute."""
    RANK_HANGS = "rank-hangs"
    """The same, stopped by SIGSTOP: it is there and does nothing."""


RANK_FAULTS = frozenset((Fault.RANK, Fault.RANK_HANGS))


class FaultOptions(msgspec.Struct, frozen=True, kw_only=True):
    cluster: ClusterSetup
    streams: int = 32
    output_tokens: int = 400
    faults: tuple[Fault, ...] = tuple(fault for fault in Fault if fault not in RANK_FAULTS)
    seed: int = 0


class FaultResult(msgspec.Struct, frozen=True, kw_only=True):
    fault: Fault
    streams: int
    unfinished: int
    """Streams that were still open when it was killed: those that could be broken."""
    affected: int
    """Of a gateway: streams that ran over it. Of others: all."""
    broken: int
    """Streams that did not get their whole answer."""
    broken_elsewhere: int
    """Of those, streams over another gateway than the one that was killed."""
    identical: int
    """Whole answers with the text of the undisturbed run."""
    retried: int
    """Requests that were sent again because their gateway was killed, and got the same text."""
    silence_s: float
    """Longest pause of any stream that ended well, from the kill on."""
    silence_before_s: float
    """The same before the kill."""
    noticed_s: float | None
    """From the kill until the controller knew that something is not as planned; None: it never was."""
    settled_s: float
    """From the kill until the machines were as the plan says again, the node given back where one was killed."""
    errors: tuple[str, ...]
    """Of broken streams, each once."""


class FaultBenchResult(msgspec.Struct, frozen=True, kw_only=True):
    options: FaultOptions
    cores: int
    cpu: CpuUse
    """Over the undisturbed streams."""
    executor: str
    results: tuple[FaultResult, ...]


def run_fault_bench(options: FaultOptions, say: Callable[[str], None] = lambda _line: None) -> FaultBenchResult:
    """Raises what ``start_platform`` raises."""
    with bench_cluster(options.cluster, say) as bench:
        return asyncio.run(measure_faults(bench, options, say))


async def measure_faults(
    bench: BenchCluster, options: FaultOptions, say: Callable[[str], None] = lambda _line: None
) -> FaultBenchResult:
    """``options.cluster`` is what ``bench`` was started with. AssertionError when undisturbed streams break."""
    requests = _requests(bench, options)
    warm = _Run(bench, options, requests)
    await warm.undisturbed()
    reference = _Run(bench, options, requests)
    meter = CpuMeter()
    await reference.undisturbed()
    cpu = meter.read()
    texts = [stream.text for stream in reference.streams]
    results = []
    for fault in options.faults:
        run = _Run(bench, options, requests)
        result = await run.disturbed(fault, texts)
        say(f"{fault}: {result.broken} of {result.streams} broken, silent for {result.silence_s:.2f} s")
        results.append(result)
    return FaultBenchResult(
        options=options,
        cores=os.cpu_count() or 1,
        cpu=cpu,
        executor=options.cluster.executor,
        results=tuple(results),
    )


def _requests(bench: BenchCluster, options: FaultOptions) -> list[WatchedStream]:
    spec = load_model_spec(MODEL, BASE)
    numbers = random.Random(options.seed)
    models = itertools.cycle(bench.models)
    return [
        WatchedStream(
            model=next(models),
            prompt=numbers.choices(range(spec.vocab_size), k=_PROMPT_TOKENS),
            seed=numbers.randrange(1 << 30),
        )
        for _ in range(options.streams)
    ]


class _Run:
    """All streams, once."""

    def __init__(self, bench: BenchCluster, options: FaultOptions, requests: Sequence[WatchedStream]) -> None:
        self._bench = bench
        self._options = options
        self.streams = [same_request(request) for request in requests]

    async def undisturbed(self) -> None:
        """Raises AssertionError when a stream breaks: then there is nothing to compare with."""
        watch = self._watch()
        try:
            watch.begin(self.streams)
            await watch.wait_end()
        finally:
            await watch.close()
        broken = [stream.error for stream in self.streams if stream.error]
        assert not broken, f"undisturbed streams broke: {broken[:3]}"

    async def disturbed(self, fault: Fault, texts: Sequence[str]) -> FaultResult:
        watch = self._watch()
        try:
            watch.begin(self.streams)
            await watch.wait_pieces(_PIECES_BEFORE)
            unfinished = sum(not stream.done for stream in self.streams)
            killed_s = time.monotonic()
            await asyncio.to_thread(self._kill, fault)
            noticing = asyncio.create_task(self._unsettled())
            await watch.wait_end()
        finally:
            await watch.close()
        retried = await self._retry(texts) if fault is Fault.GATEWAY else 0
        if fault is Fault.NODE:
            # Ray starts nodes from the main thread alone; no stream is open now.
            self._bench.add_node(0)
        await asyncio.to_thread(self._bench.wait_settled)
        settled_s = time.monotonic() - killed_s
        # What nobody has noticed by now was nothing to the controller.
        noticing.cancel()
        (noticed,) = await asyncio.gather(noticing, return_exceptions=True)
        return self._result(
            fault,
            texts,
            unfinished=unfinished,
            killed_s=killed_s,
            retried=retried,
            noticed_s=noticed - killed_s if isinstance(noticed, float) else None,
            settled_s=settled_s,
        )

    async def _unsettled(self) -> float:
        """When the controller says so; time.monotonic()."""
        while True:
            with contextlib.suppress(ray.exceptions.RayError):  # it is away
                if not (await asyncio.to_thread(self._bench.status)).settled:
                    return time.monotonic()
            await asyncio.sleep(_POLL_S)

    def _watch(self) -> StreamWatch:
        return StreamWatch(self._bench.url, self._bench.key, output_tokens=self._options.output_tokens)

    def _kill(self, fault: Fault) -> None:
        bench = self._bench
        match fault:
            case Fault.REPLICA:
                bench.process_of(bench.replica_ids()[0]).kill()
            case Fault.NODE:
                bench.cluster.kill_node(node_name(0))
            case Fault.CONTROLLER:
                (process,) = bench.processes("ControllerActor")
                process.kill()
            case Fault.SERVE_CONTROLLER:
                (process,) = bench.processes("ServeController")
                process.kill()
            case Fault.GATEWAY:
                bench.processes("ServeReplica:loraplex:gateway")[0].kill()
            case Fault.RANK:
                bench.ranks_of(bench.busiest_replica())[-1].kill()
            case Fault.RANK_HANGS:
                bench.ranks_of(bench.busiest_replica())[-1].suspend()

    async def _retry(self, texts: Sequence[str]) -> int:
        """Sends the broken ones again, as clients do, until a gateway takes them."""
        broken = [(stream, text) for stream, text in zip(self.streams, texts, strict=True) if not stream.done]
        waiting = [(same_request(stream), text) for stream, text in broken]
        num_right, deadline_s = 0, time.monotonic() + 60
        while waiting and time.monotonic() < deadline_s:
            watch = self._watch()
            try:
                watch.begin([stream for stream, _ in waiting])
                await watch.wait_end()
            finally:
                await watch.close()
            num_right += sum(stream.done and stream.text == text for stream, text in waiting)
            waiting = [(same_request(stream), text) for stream, text in waiting if not stream.done]
            await asyncio.sleep(0.2)
        return num_right

    def _result(
        self,
        fault: Fault,
        texts: Sequence[str],
        *,
        unfinished: int,
        killed_s: float,
        retried: int,
        noticed_s: float | None,
        settled_s: float,
    ) -> FaultResult:
        whole = [stream.done and not stream.error for stream in self.streams]
        # The gateway whose streams broke is the one that was killed.
        hit = {stream.gateway for stream, good in zip(self.streams, whole, strict=True) if not good}
        killed = min(hit) if fault is Fault.GATEWAY and hit else ""
        over_it = sum(stream.gateway == killed for stream in self.streams)
        return FaultResult(
            fault=fault,
            streams=len(self.streams),
            unfinished=unfinished,
            affected=over_it if fault is Fault.GATEWAY else len(self.streams),
            broken=whole.count(False),
            broken_elsewhere=sum(
                not good and stream.gateway != killed for stream, good in zip(self.streams, whole, strict=True)
            ),
            identical=sum(
                good and stream.text == text for stream, good, text in zip(self.streams, whole, texts, strict=True)
            ),
            retried=retried,
            silence_s=max(
                (stream.silence_s(killed_s) for stream, good in zip(self.streams, whole, strict=True) if good),
                default=0.0,
            ),
            silence_before_s=max(_pause_before(stream, killed_s) for stream in self.streams),
            noticed_s=noticed_s,
            settled_s=settled_s,
            errors=tuple(sorted({stream.error for stream in self.streams if stream.error})),
        )


def _pause_before(stream: WatchedStream, killed_s: float) -> float:
    times_s = [time_s for time_s in stream.times_s if time_s < killed_s]
    return max((after - before for before, after in itertools.pairwise(times_s)), default=0.0)
