"""A loaded model and its made-up adapters in host memory, on which any number of loads run, each with a fresh engine.

No Ray, no network, no text. Owns the executor, the engine at hand and the adapters. Called by ``engine_bench``,
``single_ttft`` and ``sweep``.
"""

import gc
import os
import random
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import torch

from loraplex.bench.measure_ceilings import measure_ceilings, share_of_cpu
from loraplex.bench.options import EngineLoad, EngineSetup
from loraplex.bench.random_adapters import draw_adapters, random_manifests
from loraplex.bench.recorder import RecordingEngine
from loraplex.bench.results import AdapterTraffic, LoadResult, Machine, Percentiles
from loraplex.core.adapter import AdapterManifest, AdapterRef
from loraplex.core.clock import SystemClock
from loraplex.core.collector import exempt_loaded
from loraplex.core.errors import BadConfig, LoraplexError
from loraplex.core.ids import BaseModelId, Digest, RequestId, TenantName
from loraplex.core.request import EngineRequest, FinishReason, RequestOutput, SamplingParams
from loraplex.cost.ceilings import Ceilings, ceilings_of, ceilings_of_device, known_gpus
from loraplex.engine import EngineConfig
from loraplex.model_runner import ExecutorConfig, build_executor
from loraplex.replica.driver import StepDriver

_BASE = BaseModelId("bench")
_TENANT = TenantName("bench")
_STAGING_THREADS = 8
_WARMUP_TOKENS = 4


class BenchSession:
    def __init__(self, setup: EngineSetup, *, graph_patience: int = 0) -> None:
        """Loads the model and answers one request. Raises BadConfig. ``graph_patience``: of the executor; 0: what runs
        twice in the warm-up is captured there."""
        self.setup = setup
        # Before the model: a file that is not there should not cost a minute.
        given = None if setup.ceilings is None else _given_ceilings(setup.ceilings)
        config = msgspec.convert(
            {
                "device": setup.device,
                "dtype": setup.dtype,
                "tp": setup.tp,
                "pp": setup.pp,
                "num_threads": setup.threads,
                "num_pages": setup.num_pages,
                "memory_fraction": setup.memory_fraction,
                "max_rows": setup.max_running,
                "max_step_tokens": setup.max_step_tokens,
                "batch_invariant": setup.batch_invariant,
                "graph_patience": graph_patience,
            },
            ExecutorConfig,
        )
        self.executor = build_executor(config, model=setup.model, base_model_id=_BASE)
        self._staged: dict[Digest, float] = {}
        self._random = random.Random(0)
        self._num_requests = 0
        self._engine: RecordingEngine | None = None
        try:
            self._open(EngineLoad(), ())
            self.drive([self.request(None, input_tokens=1, output_tokens=1)])
            ready_s = _process_age_s()
            self.ceilings = given or self._device_ceilings()
            exempt_loaded()
        except BaseException:
            self.executor.close()
            raise
        arena = self.executor.arena
        self.machine = Machine(
            setup=setup,
            device_name=_device_name(setup.device),
            torch_version=str(torch.__version__),
            num_pages=arena.num_pages,
            page_bytes=arena.page_bytes,
            ready_s=ready_s,
        )

    @property
    def engine(self) -> RecordingEngine:
        """Of the load at hand."""
        assert self._engine is not None, "no engine is open"
        return self._engine

    @property
    def itemsize(self) -> int:
        """Bytes of a weight, of KV and of an adapter's element."""
        return self.executor.itemsize

    def run(self, load: EngineLoad) -> LoadResult:
        """Warms up, runs the load, returns the figures. Raises BadConfig, InvalidInput; LoraplexError itself when a
        request ends with an error."""
        manifests = self.prepare(load)
        requests = self.requests(load, manifests)
        gc.collect()
        engine, driver = self.engine, self._driver
        engine.clear()
        steps, busy_s, preemptions = driver.num_steps, driver.busy_s, engine.num_preemptions
        timings, duration_s = self.drive(requests, concurrency=load.concurrency)
        steps, busy_s = driver.num_steps - steps, driver.busy_s - busy_s
        output_tokens = sum(timing.num_tokens for timing in timings)
        prompt_tokens = load.requests * load.input_tokens
        several = [timing for timing in timings if timing.num_tokens > 1]
        return LoadResult(
            load=load,
            duration_s=duration_s,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            output_tokens_per_s=output_tokens / duration_s,
            total_tokens_per_s=(prompt_tokens + output_tokens) / duration_s,
            ttft_s=Percentiles.of([timing.ttft_s for timing in timings]),
            tpot_s=Percentiles.of([timing.tpot_s for timing in several]) if several else None,
            e2e_s=Percentiles.of([timing.last_s - timing.submitted_s for timing in timings]),
            steps=steps,
            mean_step_s=busy_s / steps,
            engine_share=1.0 - busy_s / duration_s,
            preemptions=engine.num_preemptions - preemptions,
            adapters=self._traffic(load, manifests, duration_s) if load.adapters else None,
            eta=engine.eta(manifests, self.ceilings),
        )

    def prepare(self, load: EngineLoad) -> tuple[AdapterManifest, ...]:
        """A fresh engine that has run the load's warm-up and knows its adapters, which are where the load says.

        On a GPU the warm-up runs twice: steps that come again are captured."""
        load.check()
        manifests = self.stage(load)
        self._open(load, manifests)
        at_once = min(load.concurrency or load.requests, load.requests, self.setup.max_running)
        count = at_once if load.warmup_requests is None else min(load.warmup_requests, load.requests)
        for _ in range(1 if self.setup.device == "cpu" else 2):
            self.drive(self.requests(load, manifests, output_tokens=min(_WARMUP_TOKENS, load.output_tokens))[:count])
        if not load.resident:
            self._open(load, manifests)
        else:
            # The least popular first: what does not fit is dropped in the order of use.
            self.load_adapters(reversed(manifests))
        return manifests

    def stage(self, load: EngineLoad) -> tuple[AdapterManifest, ...]:
        """Puts the load's adapters into host memory, where they stay for later loads."""
        manifests = random_manifests(
            self.executor.model,
            count=load.adapters,
            lora_ranks=load.lora_ranks,
            modules=load.modules,
            seed=load.seed,
        )

        def stage(manifest: AdapterManifest) -> float:
            started_s = time.perf_counter()
            self.executor.stage_random_adapter(manifest, int(manifest.digest[:15], 16))
            return time.perf_counter() - started_s

        missing = [manifest for manifest in manifests if manifest.digest not in self._staged]
        with ThreadPoolExecutor(_STAGING_THREADS) as threads:
            for manifest, seconds in zip(missing, threads.map(stage, missing), strict=True):
                self._staged[manifest.digest] = seconds
        return manifests

    def load_adapters(self, manifests: Iterable[AdapterManifest]) -> None:
        """Onto the accelerator: a request of one token for each."""
        self.drive([self.request(manifest, input_tokens=1, output_tokens=1) for manifest in manifests])

    def requests(
        self, load: EngineLoad, manifests: Sequence[AdapterManifest], *, output_tokens: int | None = None
    ) -> list[EngineRequest]:
        """New prompts each time."""
        drawn = draw_adapters(
            load.requests, len(manifests), load.popularity, zipf_exponent=load.zipf_exponent, seed=load.seed
        )
        adapters = [None if index is None else manifests[index] for index in drawn]
        tokens = output_tokens or load.output_tokens
        return [self.request(adapter, input_tokens=load.input_tokens, output_tokens=tokens) for adapter in adapters]

    def request(self, adapter: AdapterManifest | None, *, input_tokens: int, output_tokens: int) -> EngineRequest:
        self._num_requests += 1
        ref = None
        if adapter is not None:
            ref = AdapterRef(tenant=_TENANT, name=adapter.digest[:8], version=1, digest=adapter.digest)
        return EngineRequest(
            request_id=RequestId(f"bench-{self._num_requests}"),
            tenant=_TENANT,
            base_model_id=_BASE,
            adapter=ref,
            prompt_token_ids=tuple(self._random.choices(range(self.executor.model.vocab_size), k=input_tokens)),
            sampling=SamplingParams(max_tokens=output_tokens, seed=0, temperature=0.0, ignore_eos=True),
            arrival_s=0.0,
            cache_salt="bench",
        )

    def drive(
        self, requests: Sequence[EngineRequest], *, concurrency: int | None = None
    ) -> tuple[list["Timing"], float]:
        """Runs all requests to their end, ``concurrency`` at a time (None: all at once); returns their timings and
        the whole duration in seconds."""
        timings: dict[RequestId, Timing] = {}
        waiting = iter(requests)
        started_s = time.perf_counter()
        self.submit(waiting, timings, concurrency or len(requests))
        while self.engine.num_unfinished:
            num_finished = self.step(timings)
            self.submit(waiting, timings, num_finished)
        duration_s = time.perf_counter() - started_s
        # What is still in flight is nobody's.
        while self._driver.step().progressed:
            pass
        return list(timings.values()), duration_s

    def submit(self, waiting: Iterator[EngineRequest], timings: dict[RequestId, "Timing"], count: int) -> None:
        """Hands the engine the next ``count`` requests, or what is left of them."""
        for _ in range(count):
            request = next(waiting, None)
            if request is None:
                return
            timings[request.request_id] = Timing(time.perf_counter())
            self.engine.add(request, time.monotonic())

    def step(self, timings: dict[RequestId, "Timing"]) -> int:
        """One turn of the driver; returns how many requests ended in it."""
        outcome = self._driver.step()
        assert outcome.progressed, "the engine stalled"
        now_s = time.perf_counter()
        return sum(timings[output.request_id].take(output, now_s) for output in outcome.outputs)

    def close(self) -> None:
        self.executor.close()
        gc.unfreeze()

    def _open(self, load: EngineLoad, manifests: Sequence[AdapterManifest]) -> None:
        """A new engine: nothing is on the accelerator."""
        last_step = 0
        if self._engine is not None:
            last_step = self._engine.last_step
            for digest in self._engine.resident_adapters():
                self.executor.drop_adapter(digest)
        config = EngineConfig(
            max_running=self.setup.max_running,
            max_step_tokens=self.setup.max_step_tokens,
            max_waiting=max(load.requests, len(manifests)),
            # All adapters stay staged: nobody would stage one again.
            max_host_bytes=sys.maxsize,
            max_adapter_bytes=load.adapter_bytes_cap,
        )
        engine = self._engine = RecordingEngine(
            config, self.executor, itemsize=self.itemsize, shape=self.setup.shape, last_step=last_step
        )
        self._driver = StepDriver(engine, self.executor, clock=SystemClock(), unstage=self.executor.unstage_adapter)
        for manifest in manifests:
            engine.adapter_staged(manifest.digest, self.executor.adapter_pages(manifest), time.monotonic())

    def _traffic(self, load: EngineLoad, manifests: Sequence[AdapterManifest], duration_s: float) -> AdapterTraffic:
        loads = self.engine.num_loads
        return AdapterTraffic(
            pages=sum(self.executor.adapter_pages(manifest) for manifest in manifests) / len(manifests),
            stage_s=sum(self._staged[manifest.digest] for manifest in manifests) / len(manifests),
            loads=loads,
            loads_per_s=loads / duration_s,
            hit_rate=1.0 - loads / load.requests,
        )

    def _device_ceilings(self) -> Ceilings:
        name = _device_name(self.setup.device)
        known = ceilings_of_device(name) if self.itemsize == 2 else None
        if known is not None:
            return known
        dtype = {4: torch.float32, 2: torch.bfloat16}[self.itemsize]
        ceilings = measure_ceilings(name, torch.device(self.setup.device), dtype)
        return share_of_cpu(ceilings, self.setup.shape.num_ranks)


class _CeilingsFile(msgspec.Struct):
    """What is used of the output of ``kernels/benchmarks/ceilings.py``."""

    ceilings: Ceilings


class Timing:
    """When one request was submitted, and got its first and last token; seconds of ``perf_counter``."""

    __slots__ = ("first_s", "last_s", "num_tokens", "submitted_s")

    def __init__(self, submitted_s: float) -> None:
        self.submitted_s = submitted_s
        self.first_s = 0.0
        self.last_s = 0.0
        self.num_tokens = 0

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.submitted_s

    @property
    def tpot_s(self) -> float:
        """Of at least two tokens."""
        return (self.last_s - self.first_s) / (self.num_tokens - 1)

    def take(self, output: RequestOutput, now_s: float) -> bool:
        """True when the request has ended. Raises LoraplexError when it did so with an error."""
        if output.finish_reason is FinishReason.ERROR:
            raise LoraplexError(f"request {output.request_id} failed: {output.error}")
        if self.num_tokens == 0:
            self.first_s = now_s
        self.num_tokens += len(output.tokens)
        self.last_s = now_s
        return output.finish_reason is not None


def _given_ceilings(name: str) -> Ceilings:
    path = Path(name)
    if not path.suffix:
        return ceilings_of(name)
    try:
        return msgspec.json.decode(path.read_bytes(), type=_CeilingsFile).ceilings
    except (OSError, msgspec.DecodeError) as error:
        raise BadConfig(
            f"{name}: not a file of ceilings ({error}); known GPUs: {', '.join(known_gpus())}", param="ceilings"
        ) from error


def _process_age_s() -> float | None:
    """Seconds since this process started (Linux)."""
    try:
        # Field 22, counted after the name in parentheses, which may hold blanks.
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"
