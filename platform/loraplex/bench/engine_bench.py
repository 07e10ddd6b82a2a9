"""Engine and executor alone: how many tokens a second, how long to the first, how long between two.

No Ray, no network, no text: random prompts, greedy decoding, every request generates exactly ``output_tokens``. All
requests are there at once, or ``concurrency`` of them at a time. Adapters are staged in host memory before the clock
starts; loading them onto the accelerator counts. Called by ``loraplex bench engine``.
"""

import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import torch

from loraplex.bench.random_adapters import write_random_adapters
from loraplex.core.adapter import AdapterManifest, AdapterRef
from loraplex.core.clock import SystemClock
from loraplex.core.errors import LoraplexError
from loraplex.core.ids import BaseModelId, Digest, RequestId, TenantName
from loraplex.core.request import EngineRequest, FinishReason, RequestOutput, SamplingParams
from loraplex.core.step import Executor
from loraplex.engine import Engine, EngineConfig
from loraplex.model_runner import ExecutorConfig, build_executor
from loraplex.replica.driver import StepDriver

_BASE = BaseModelId("bench")
_TENANT = TenantName("bench")

_AtLeastOne = Annotated[int, msgspec.Meta(ge=1)]
_NotNegative = Annotated[int, msgspec.Meta(ge=0)]


class EngineBenchOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: str
    """A Hugging Face directory, a .gguf file, or ``random:NAME``."""
    requests: _AtLeastOne = 64
    input_tokens: _AtLeastOne = 256
    output_tokens: _AtLeastOne = 128
    adapters: _NotNegative = 0
    """Distinct adapters, given to the requests in turn; 0 means the plain base."""
    rank: _AtLeastOne = 16
    """LoRA rank of each adapter, on all seven projections."""
    concurrency: _AtLeastOne | None = None
    """Unfinished requests at a time; None submits all at once."""
    device: str = "cpu"
    dtype: str = "auto"
    threads: _AtLeastOne | None = None
    """torch threads on the CPU; None leaves torch's choice."""
    max_running: _AtLeastOne = 256
    max_step_tokens: _AtLeastOne = 2048
    num_pages: _AtLeastOne | None = None
    """Pages of the arena; None leaves the executor's choice."""
    warmup_requests: _NotNegative = 4
    """Short requests that run before the clock starts, with an adapter of their own."""
    seed: _NotNegative = 0


class Percentiles(msgspec.Struct, frozen=True, kw_only=True):
    """Of seconds."""

    mean: float
    p50: float
    p90: float
    p99: float


class EngineBenchResult(msgspec.Struct, frozen=True, kw_only=True):
    options: EngineBenchOptions
    device_name: str
    torch_version: str
    num_pages: int
    page_bytes: int
    adapter_pages: int
    """Pages of one adapter; 0 without."""
    stage_s: float
    """Mean time to read one adapter into host memory, before the clock; 0 without."""
    duration_s: float
    prompt_tokens: int
    output_tokens: int
    output_tokens_per_s: float
    total_tokens_per_s: float
    ttft_s: Percentiles
    """From the submission of a request to its first token."""
    tpot_s: Percentiles | None
    """(E2E - TTFT) / (output tokens - 1); None when requests generate a single token."""
    e2e_s: Percentiles
    steps: int
    mean_step_s: float
    """Of the executor's part alone."""
    engine_share: float
    """Part of the duration that was not spent in the executor."""
    preemptions: int


def run_engine_bench(options: EngineBenchOptions) -> EngineBenchResult:
    """Builds the model, runs the load, returns the figures. Raises BadConfig, InvalidInput; LoraplexError
    itself when a request ends with an error."""
    config = msgspec.convert(
        {
            "device": options.device,
            "dtype": options.dtype,
            "num_threads": options.threads,
            "num_pages": options.num_pages,
            "max_rows": options.max_running,
            "max_step_tokens": options.max_step_tokens,
        },
        ExecutorConfig,
    )
    executor = build_executor(config, model=options.model, base_model_id=_BASE)
    try:
        with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as directory:
            # The last adapter is the warm-up's own, so that the others are cold on the accelerator.
            count = options.adapters + 1 if options.adapters else 0
            adapters = write_random_adapters(
                Path(directory), executor.model, count=count, lora_rank=options.rank, seed=options.seed
            )
            return _Bench(options, executor, adapters).run()
    finally:
        executor.close()


class _Bench:
    def __init__(
        self, options: EngineBenchOptions, executor: Executor, adapters: dict[Digest, tuple[AdapterManifest, str]]
    ) -> None:
        self._options = options
        self._executor = executor
        self._digests = tuple(adapters)
        config = EngineConfig(
            max_running=options.max_running,
            max_step_tokens=options.max_step_tokens,
            max_waiting=options.requests,
            # All adapters stay staged: nobody would stage one again.
            max_host_pages=sys.maxsize,
        )
        self._engine = Engine(config, model=executor.model, arena=executor.arena)
        self._driver = StepDriver(self._engine, executor, clock=SystemClock(), unstage=executor.unstage_adapter)
        self._random = random.Random(options.seed)
        self._adapter_pages = 0
        started_s = time.perf_counter()
        for digest, (manifest, path) in adapters.items():
            executor.stage_adapter(manifest, path)
            self._adapter_pages = executor.adapter_pages(manifest)
            self._engine.adapter_staged(digest, self._adapter_pages, time.monotonic())
        self._stage_s = (time.perf_counter() - started_s) / max(1, len(adapters))

    def run(self) -> EngineBenchResult:
        options = self._options
        self._drive(self._warmup_requests())
        steps, busy_s, preemptions = self._driver.num_steps, self._driver.busy_s, self._engine.num_preemptions
        requests = [self._request(f"r{i}", i, options.output_tokens) for i in range(options.requests)]
        timings, duration_s = self._drive(requests)
        steps, busy_s = self._driver.num_steps - steps, self._driver.busy_s - busy_s
        output_tokens = sum(timing.num_tokens for timing in timings)
        prompt_tokens = options.requests * options.input_tokens
        several = [timing for timing in timings if timing.num_tokens > 1]
        return EngineBenchResult(
            options=options,
            device_name=_device_name(options.device),
            torch_version=str(torch.__version__),
            num_pages=self._executor.arena.num_pages,
            page_bytes=self._executor.arena.page_bytes,
            adapter_pages=self._adapter_pages,
            stage_s=self._stage_s,
            duration_s=duration_s,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            output_tokens_per_s=output_tokens / duration_s,
            total_tokens_per_s=(prompt_tokens + output_tokens) / duration_s,
            ttft_s=_percentiles([timing.first_s - timing.submitted_s for timing in timings]),
            tpot_s=_percentiles([(t.last_s - t.first_s) / (t.num_tokens - 1) for t in several]) if several else None,
            e2e_s=_percentiles([timing.last_s - timing.submitted_s for timing in timings]),
            steps=steps,
            mean_step_s=busy_s / steps,
            engine_share=1.0 - busy_s / duration_s,
            preemptions=self._engine.num_preemptions - preemptions,
        )

    def _warmup_requests(self) -> list[EngineRequest]:
        count = min(self._options.warmup_requests, self._options.requests)
        # Index -1 picks the adapter that no other request uses.
        return [self._request(f"warmup{i}", -1, min(4, self._options.output_tokens)) for i in range(count)]

    def _request(self, name: str, index: int, output_tokens: int) -> EngineRequest:
        adapter: AdapterRef | None = None
        if self._digests:
            digest = self._digests[index % self._options.adapters if index >= 0 else index]
            adapter = AdapterRef(tenant=_TENANT, name=f"adapter-{index}", version=1, digest=digest)
        vocab_size = self._executor.model.vocab_size
        return EngineRequest(
            request_id=RequestId(name),
            tenant=_TENANT,
            base_model_id=_BASE,
            adapter=adapter,
            prompt_token_ids=tuple(self._random.randrange(vocab_size) for _ in range(self._options.input_tokens)),
            sampling=SamplingParams(max_tokens=output_tokens, seed=0, temperature=0.0, ignore_eos=True),
            arrival_s=0.0,
            cache_salt="bench",
        )

    def _drive(self, requests: list[EngineRequest]) -> tuple[list["_Timing"], float]:
        """Runs all requests to their end; returns their timings and the whole duration in seconds."""
        timings: dict[RequestId, _Timing] = {}
        waiting = iter(requests)
        started_s = time.perf_counter()
        self._submit(waiting, timings, self._options.concurrency or len(requests))
        while self._engine.num_unfinished:
            outcome = self._driver.step()
            assert outcome.progressed, "the engine stalled"
            now_s = time.perf_counter()
            num_finished = sum(timings[output.request_id].take(output, now_s) for output in outcome.outputs)
            self._submit(waiting, timings, num_finished)
        return list(timings.values()), time.perf_counter() - started_s

    def _submit(self, waiting: Iterator[EngineRequest], timings: dict[RequestId, "_Timing"], count: int) -> None:
        for _ in range(count):
            request = next(waiting, None)
            if request is None:
                return
            timings[request.request_id] = _Timing(time.perf_counter())
            self._engine.add(request, time.monotonic())


class _Timing:
    """When one request was submitted, and got its first and last token; seconds of ``perf_counter``."""

    __slots__ = ("first_s", "last_s", "num_tokens", "submitted_s")

    def __init__(self, submitted_s: float) -> None:
        self.submitted_s = submitted_s
        self.first_s = 0.0
        self.last_s = 0.0
        self.num_tokens = 0

    def take(self, output: RequestOutput, now_s: float) -> bool:
        """True when the request has ended. Raises LoraplexError when it did so with an error."""
        if output.finish_reason is FinishReason.ERROR:
            raise LoraplexError(f"request {output.request_id} failed: {output.error}")
        if self.num_tokens == 0:
            self.first_s = now_s
        self.num_tokens += len(output.tokens)
        self.last_s = now_s
        return output.finish_reason is not None


def _percentiles(values: list[float]) -> Percentiles:
    p50, p90, p99 = (float(value) for value in np.percentile(values, (50, 90, 99)))
    return Percentiles(mean=float(np.mean(values)), p50=p50, p90=p90, p99=p99)


def _device_name(device: str) -> str:
    return (
        torch.cuda.get_device_name(device) if device.startswith("cuda") else f"cpu, {torch.get_num_threads()} threads"
    )
