"""What telemetry costs the engine: tokens per second of the engine loop with metrics and traces, against none.

The same requests run in turn with (each counted as a gateway counts it and, if sampled, traced to a collector in
another process, while the metrics are read) and without. All in one process, so that the gateway's share comes on top
of the engine's. Run by hand: ``python -m loraplex.bench.telemetry_cost``.
"""

import argparse
import json
import multiprocessing
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection

import grpc
import msgspec
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from loraplex.core.adapter import AdapterManifest
from loraplex.core.ids import BaseModelId, Digest, ReplicaId, RequestId, TenantName
from loraplex.core.request import EngineRequest, SamplingParams
from loraplex.core.step import Executor
from loraplex.core.wire import LoadReport, ReplicaFrame
from loraplex.engine import EngineConfig
from loraplex.model_runner import ExecutorConfig, build_executor
from loraplex.replica.engine_loop import EngineLoop
from loraplex.telemetry.config import TelemetryConfig, TracingConfig
from loraplex.telemetry.metrics import GatewayMetrics
from loraplex.telemetry.tracing import Span, Tracing, open_tracing

_BASE = BaseModelId("base")
_REPLICA = ReplicaId("replica-0")
_NUM_SCRAPES = 50


class Load(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    requests: int
    prompt_tokens: int
    output_tokens: int
    pairs: int
    sample_rate: float
    scrape_s: float
    """The metrics are rendered this often."""


class Parts(msgspec.Struct, frozen=True, kw_only=True):
    """CPU time of what telemetry does, each done many times without an engine that runs."""

    us_per_request: float
    """Counted and, one in 1 / ``sample_rate``, traced."""
    us_per_step: float
    """The replica's state taken over, with 256 resident adapters."""
    us_per_scrape: float
    """The metrics rendered."""

    def share(self, *, requests_per_s: float, steps_per_s: float, scrapes_per_s: float) -> float:
        """Of one core, for an engine of that pace."""
        return 1e-6 * (
            requests_per_s * self.us_per_request + steps_per_s * self.us_per_step + scrapes_per_s * self.us_per_scrape
        )


class TelemetryCost(msgspec.Struct, frozen=True, kw_only=True):
    load: Load
    machine: str
    tokens_per_s_without: float
    """Median, as the next."""
    tokens_per_s_with: float
    throughput_ratio: float
    """With / without: the median over pairs that ran one after the other."""
    throughput_ratios: tuple[float, ...]
    """Of each pair: they scatter with what else the machine does."""
    cpu_ratio: float
    """Likewise of the process's CPU time for each token, which does not."""
    cpu_ratios: tuple[float, ...]
    cost_percent: float
    """Of the throughput of an engine that the CPU limits, as this one: 1 - 1 / ``cpu_ratio``."""
    parts: Parts
    """What does not depend on what else the machine does, or on the engine."""
    num_spans: int
    """That reached the collector, of all runs."""


def _us_each(call: Callable[[], object], *, count: int = 2000) -> float:
    """CPU time of the process, the thread that sends spans included."""
    started_s = time.process_time()
    for _ in range(count):
        call()
    return round(1e6 * (time.process_time() - started_s) / count, 2)


class _NoAdapters:
    @contextmanager
    def open(self, digest: Digest) -> Iterator[tuple[AdapterManifest, str]]:
        raise OSError(f"no adapter {digest}")
        yield  # makes it a generator


class _Bench:
    """One engine loop, driven as a gateway's session would."""

    def __init__(self, executor: Executor, load: Load, tracing: Tracing) -> None:
        self._load = load
        self._tracing = tracing
        self._metrics = GatewayMetrics(TelemetryConfig())
        self._spans: dict[RequestId, Span] = {}
        self._telling = False
        self._num_tokens = self._num_open = self._number = 0
        self._done = threading.Event()
        # Without the prefix cache every run computes the same.
        config = EngineConfig(max_running=load.requests, prefix_cache=False)
        self._loop = EngineLoop(
            replica_id=_REPLICA, executor=executor, engine_config=config, source=_NoAdapters(), tracing=tracing
        )
        self._loop.connect(self._deliver, on_end=lambda: None)
        self._loop.start()
        self._loop.open_session(1)

    def run(self, *, telling: bool) -> tuple[float, float]:
        """(tokens per second, CPU seconds of a token)."""
        self._telling, self._num_tokens, self._num_open = telling, 0, self._load.requests
        self._done.clear()
        requests = tuple(self._request(index) for index in range(self._load.requests))
        cpu_s, started_s = time.process_time(), time.perf_counter()
        self._loop.submit(1, tuple(self._admitted(request) for request in requests) if telling else requests)
        while not self._done.wait(self._load.scrape_s):
            if telling:
                self._metrics.render(per_tenant=True)
        wall_s = time.perf_counter() - started_s
        return self._num_tokens / wall_s, (time.process_time() - cpu_s) / self._num_tokens

    def parts(self) -> Parts:
        load = LoadReport(num_running=256, resident_adapters=tuple(Digest(f"{index:064x}") for index in range(256)))

        def request() -> None:
            self._finished(self._admitted(self._request(0)).request_id)

        return Parts(
            us_per_request=_us_each(request),
            us_per_step=_us_each(lambda: self._metrics.replicas.replace({_REPLICA: load}, ())),
            us_per_scrape=_us_each(lambda: self._metrics.render(per_tenant=True), count=_NUM_SCRAPES),
        )

    def close(self) -> None:
        self._loop.stop()
        self._loop.join()

    def _request(self, index: int) -> EngineRequest:
        self._number += 1
        return EngineRequest(
            request_id=RequestId(f"r{self._number}"),
            tenant=TenantName(f"tenant{index % 8}"),
            base_model_id=_BASE,
            adapter=None,
            prompt_token_ids=tuple((7 * index + position) % 1000 for position in range(self._load.prompt_tokens)),
            sampling=SamplingParams(max_tokens=self._load.output_tokens, seed=index, temperature=0.0, ignore_eos=True),
            arrival_s=time.time(),
            cache_salt="",
        )

    def _admitted(self, request: EngineRequest) -> EngineRequest:
        """As gateway and router treat it before it goes out."""
        self._metrics.started()
        span = self._tracing.begin("completions", caller=None, start_s=request.arrival_s)
        span.set(request_id=request.request_id, tenant=request.tenant)
        self._spans[request.request_id] = span
        return replace(request, traceparent=span.traceparent)

    def _deliver(self, frames: dict[int, ReplicaFrame]) -> None:
        for frame in frames.values():
            if frame.load is not None and self._telling:
                self._metrics.replicas.replace({_REPLICA: frame.load}, ())
            for output in frame.outputs:
                self._num_tokens += len(output.tokens)
                if output.finish_reason is None:
                    continue
                if self._telling:
                    self._finished(output.request_id)
                self._num_open -= 1
                if self._num_open == 0:
                    self._done.set()

    def _finished(self, request_id: RequestId) -> None:
        span = self._spans.pop(request_id)
        span.set(status=200, output_tokens=self._load.output_tokens)
        span.end()
        self._metrics.finished(
            endpoint="completions",
            tenant=TenantName("tenant"),
            adapter="adapter",
            status=200,
            prompt_tokens=self._load.prompt_tokens,
            cached_tokens=0,
            output_tokens=self._load.output_tokens,
            ttft_s=0.1,
            tpot_s=0.01,
            e2e_s=1.0,
            now_s=time.monotonic(),
        )


class _Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.num_spans = 0

    def Export(  # noqa: N802 (the name of the method on the wire)
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        for resource in request.resource_spans:
            self.num_spans += sum(len(scope.spans) for scope in resource.scope_spans)
        return trace_service_pb2.ExportTraceServiceResponse()


def _collect(parent: Connection) -> None:
    """Tells its port, and at the end how many spans came."""
    server = grpc.server(futures.ThreadPoolExecutor(1))
    collector = _Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    parent.send(server.add_insecure_port("127.0.0.1:0"))
    server.start()
    parent.recv()
    server.stop(1.0).wait()
    parent.send(collector.num_spans)


def measure(load: Load) -> TelemetryCost:
    """Raises BadConfig for an unknown model."""
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_collect, args=(there,), daemon=True)
    process.start()
    config = TracingConfig(endpoint=f"http://127.0.0.1:{here.recv()}", sample_rate=load.sample_rate)
    tracing = open_tracing(config, service="replica", instance=_REPLICA)
    pages = 2 * load.requests * (1 + (load.prompt_tokens + load.output_tokens) // 16)
    executor = build_executor(
        ExecutorConfig(num_pages=pages, num_threads=1, dtype="float32"), model=load.model, base_model_id=_BASE
    )
    bench = _Bench(executor, load, tracing)
    try:
        bench.run(telling=False)
        bench.run(telling=True)
        pairs: list[dict[bool, tuple[float, float]]] = []
        for number in range(load.pairs):
            order = (False, True) if number % 2 == 0 else (True, False)
            pairs.append({telling: bench.run(telling=telling) for telling in order})
        parts = bench.parts()
    finally:
        bench.close()
        tracing.close()
    here.send(None)
    num_spans = here.recv()
    process.join()
    ratios, cpu_ratios = (tuple(round(pair[True][index] / pair[False][index], 4) for pair in pairs) for index in (0, 1))
    cpu_ratio = statistics.median(cpu_ratios)
    return TelemetryCost(
        load=load,
        machine=f"{platform.machine()}, {multiprocessing.cpu_count()} cores, 1 thread",
        tokens_per_s_without=round(statistics.median(pair[False][0] for pair in pairs), 2),
        tokens_per_s_with=round(statistics.median(pair[True][0] for pair in pairs), 2),
        throughput_ratio=statistics.median(ratios),
        throughput_ratios=ratios,
        cpu_ratio=cpu_ratio,
        cpu_ratios=cpu_ratios,
        cost_percent=round(100 * (1 - 1 / cpu_ratio), 2),
        parts=parts,
        num_spans=num_spans,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="What telemetry costs the engine.")
    parser.add_argument("--model", default="random:smollm2-135m")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--sample-rate", type=float, default=TracingConfig().sample_rate)
    parser.add_argument("--scrape-s", type=float, default=1.0)
    options = parser.parse_args()
    print(json.dumps(msgspec.to_builtins(measure(Load(**vars(options)))), indent=1))


if __name__ == "__main__":
    main()
