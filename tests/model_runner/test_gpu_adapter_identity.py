"""No request is ever served by another adapter: weights whose tokens say which adapter computed them, under random load
with eviction, replacement, reloading, preemption, aborts, two steps in flight and graph replay.

Adapter k writes into its own eight directions of the hidden state, far above everything else, and the head has a token
for each sign of each direction: ``token // 16`` is k, and 0 without an adapter. Which of the sixteen depends on the KV.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loraplex.core.adapter import AdapterBlock, AdapterManifest, AdapterRef
from loraplex.core.clock import SystemClock
from loraplex.core.errors import Conflict
from loraplex.core.ids import BaseModelId, Digest, RequestId, TenantName
from loraplex.core.model import ModelSpec
from loraplex.core.request import EngineRequest, FinishReason, Priority, SamplingParams
from loraplex.core.step import Row, RowStart, StepPlan
from loraplex.engine import Engine, EngineConfig
from loraplex.model_runner.arena import Arena
from loraplex.model_runner.drawn import Drawn
from loraplex.model_runner.executor import TorchExecutor
from loraplex.model_runner.executor_base import ExecutorBase
from loraplex.model_runner.random_models import random_spec, random_tensors
from loraplex.model_runner.sampler import Sampler
from loraplex.model_runner.shard import Shard
from loraplex.model_runner.weights import DecoderWeights, assemble_weights
from loraplex.replica.driver import StepDriver
from safetensors.torch import save_file

pytest.importorskip("triton")
from loraplex.model_runner.gpu.executor import GpuExecutor

CUDA = torch.cuda.is_available()
CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if CUDA else "cpu")
BASE = BaseModelId("identity")
DIRECTIONS = 8
LOUD = 1000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model and its adapters."""

    model: str
    num_layers: int
    num_adapters: int
    versions: int
    """Of each adapter: other weights under another digest, and the same tokens."""
    dtype: torch.dtype

    @property
    def spec(self) -> ModelSpec:
        spec = random_spec(self.model, BASE)
        vocab_size = 2 * DIRECTIONS * (self.num_adapters + 1)
        return replace(
            spec,
            num_layers=self.num_layers,
            vocab_size=vocab_size,
            tie_embeddings=False,
            max_context_tokens=512,
            eos_token_ids=(),
        )

    def weights(self, device: torch.device) -> DecoderWeights:
        spec = self.spec

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in random_tensors(self.model, spec, dtype=self.dtype, device=CPU):
                if name == "lm_head.weight":
                    eye = torch.eye(spec.vocab_size // 2, spec.hidden_size)
                    tensor.copy_(torch.stack([eye, -eye], dim=1).view(spec.vocab_size, spec.hidden_size))
                if name == "model.embed_tokens.weight":
                    tensor[:, 0] += 60.0
                yield name, tensor.to(device)

        return assemble_weights(Shard.whole(spec), tensors(), dtype=self.dtype, device=device, source="identity")


TINY = Shape(
    model="tiny-llama", num_layers=2, num_adapters=7 if CUDA else 4, versions=2 if CUDA else 1, dtype=torch.float32
)
LARGE = Shape(model="llama3-1b", num_layers=8, num_adapters=64, versions=2, dtype=torch.bfloat16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    identity: int
    manifest: AdapterManifest
    path: str


def make_adapters(shape: Shape, directory: Path) -> list[Adapter]:
    spec = shape.spec
    adapters = []
    for version in range(shape.versions):
        for identity in range(1, shape.num_adapters + 1):
            digest = Digest(f"{identity:032d}{version:032d}")
            generator = torch.Generator().manual_seed(1000 * identity + version)
            tensors, blocks = {}, []
            for layer in range(spec.num_layers):
                for module, parent in (("o_proj", "self_attn"), ("down_proj", "mlp")):
                    in_features, out_features = spec.projection_shape(module)
                    prefix = f"base_model.model.model.layers.{layer}.{parent}.{module}"
                    a_RI = torch.randn(DIRECTIONS, in_features, generator=generator) / in_features**0.5
                    b_OR = torch.zeros(out_features, DIRECTIONS)
                    b_OR[DIRECTIONS * identity : DIRECTIONS * (identity + 1)] = LOUD * torch.eye(DIRECTIONS)
                    tensors[f"{prefix}.lora_A.weight"] = a_RI.to(shape.dtype)
                    tensors[f"{prefix}.lora_B.weight"] = b_OR.to(shape.dtype)
                    blocks.append(AdapterBlock(layer=layer, module=module, lora_rank=DIRECTIONS, scale=2.0))
            path = directory / f"{digest}.safetensors"
            save_file(tensors, path)
            manifest = AdapterManifest(
                digest=digest, base_model_id=BASE, blocks=tuple(blocks), num_bytes=path.stat().st_size
            )
            adapters.append(Adapter(identity=identity, manifest=manifest, path=str(path)))
    return adapters


def build(shape: Shape, *, num_pages: int, kernels: bool, max_rows: int, graphs: bool = True) -> ExecutorBase:
    spec, device = shape.spec, DEVICE if kernels else CPU
    arena = Arena(spec, num_pages=num_pages, page_size=16, dtype=shape.dtype, device=device)
    sampler = Sampler(spec, device)
    if not kernels:
        return TorchExecutor(
            Shard.whole(spec), shape.weights(device), arena, sampler, max_rows=max_rows, max_step_tokens=64
        )
    executor = GpuExecutor(
        spec, shape.weights(device), arena, sampler, max_rows=max_rows, max_step_tokens=256, cuda_graphs=graphs
    )
    if CUDA and graphs:
        executor.warm_up()
    return executor


def make_request(index: int, adapter: Adapter | None, source: random.Random, vocab_size: int) -> EngineRequest:
    ref = None
    if adapter is not None:
        digest = adapter.manifest.digest
        ref = AdapterRef(tenant=TenantName("t"), name=f"a{adapter.identity}", version=1, digest=digest)
    prompt = [source.randrange(vocab_size) for _ in range(source.randrange(1, 34))]
    return EngineRequest(
        request_id=RequestId(f"r{index}"),
        tenant=TenantName(f"t{index % 3}"),
        base_model_id=BASE,
        adapter=ref,
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(max_tokens=source.randrange(2, 7), seed=0, temperature=0.0, ignore_eos=True),
        arrival_s=float(index),
        cache_salt="s",
        priority=Priority.OFFLINE if source.random() < 0.3 else Priority.ONLINE,
    )


class Load:
    """Requests come and go at random; what each got is in ``tokens``."""

    def __init__(self, executor: ExecutorBase, adapters: list[Adapter], *, seed: int, **config: int | None) -> None:
        self.executor = executor
        self.adapters = {adapter.manifest.digest: adapter for adapter in adapters}
        self.engine = Engine(
            EngineConfig(**config),  # type: ignore[arg-type]
            model=executor.model,
            arena=executor.arena,
        )
        self.driver = StepDriver(self.engine, executor, clock=SystemClock(), unstage=executor.unstage_adapter)
        self.source = random.Random(seed)
        self.requests: dict[RequestId, EngineRequest] = {}
        self.tokens: dict[RequestId, list[int]] = {}
        self.aborted: set[RequestId] = set()
        self.num_stagings = 0

    def add(self) -> None:
        adapter = self.source.choice([None, *self.adapters.values()])
        request = make_request(len(self.requests), adapter, self.source, self.executor.model.vocab_size)
        self.requests[request.request_id] = request
        self.tokens[request.request_id] = []
        self.engine.add(request, 0.0)

    def abort(self) -> None:
        request_id = self.source.choice([*self.requests][-12:])
        if self.engine.abort(request_id):
            self.aborted.add(request_id)

    def stage(self, digest: Digest) -> Digest:
        adapter = self.adapters[digest]
        self.executor.stage_adapter(adapter.manifest, adapter.path)
        return digest

    def run(self, num_requests: int, *, at_once: int, staging: ThreadPoolExecutor) -> None:
        while len(self.requests) < num_requests or self.engine.num_unfinished:
            while len(self.requests) < num_requests and self.engine.num_unfinished < at_once:
                self.add()
            if self.source.random() < 0.1:
                self.abort()
            for digest in staging.map(self.stage, self.engine.wanted_adapters()):
                self.num_stagings += 1
                pages = self.executor.adapter_pages(self.adapters[digest].manifest)
                assert not self.engine.adapter_staged(digest, pages, 0.0)
            for output in self.driver.step().outputs:
                assert output.finish_reason is not FinishReason.ERROR, output.error
                self.tokens[output.request_id] += [token.token_id for token in output.tokens]
        while self.driver.step().progressed:
            pass
        self.engine.validate()

    def check_identities(self) -> None:
        for request_id, request in self.requests.items():
            identity = 0 if request.adapter is None else self.adapters[request.adapter.digest].identity
            found = [token // (2 * DIRECTIONS) for token in self.tokens[request_id]]
            assert found == [identity] * len(found), f"{request_id} was served by another adapter"
            if request_id not in self.aborted:
                assert len(found) == request.sampling.max_tokens


def alone(shape: Shape, load: Load) -> dict[RequestId, list[int]]:
    """Each request by itself, in plain torch, with its adapter freshly loaded."""
    executor = build(shape, num_pages=32, kernels=False, max_rows=1)
    page = executor.arena.page_size
    tokens: dict[RequestId, list[int]] = {}
    step = 0
    for request_id, request in load.requests.items():
        digest = None
        if request.adapter is not None:
            digest = request.adapter.digest
            adapter = load.adapters[digest]
            executor.stage_adapter(adapter.manifest, adapter.path)
            executor.load_adapter(digest, tuple(range(20, 20 + executor.adapter_pages(adapter.manifest))))
        known = list(request.prompt_token_ids)
        start = RowStart(slot=0, sampling=request.sampling, token_ids=tuple(known), num_prompt_tokens=len(known))
        first, starts = 0, (start,)
        for _ in range(request.sampling.max_tokens):
            pages = tuple(range(-(-len(known) // page)))
            row = Row(slot=0, token_ids=tuple(known[first:]), start=first, pages=pages, adapter=digest, samples=True)
            step += 1
            executor.submit(StepPlan(step_id=step, releases=(), starts=starts, rows=(row,)))
            first, starts = len(known), ()
            known.append(executor.collect().tokens[0].token_id)
        tokens[request_id] = known[len(request.prompt_token_ids) :]
        step += 1
        executor.submit(StepPlan(step_id=step, releases=(0,), starts=(), rows=()))
        executor.collect()
        if digest is not None:
            executor.drop_adapter(digest)
            executor.unstage_adapter(digest)
    executor.close()
    return tokens


def check_resident_bytes(load: Load, shape: Shape) -> None:
    """Every byte of every resident adapter is what a fresh staging of its file gives."""
    executor = load.executor
    arena, fresh = executor._arena, build(shape, num_pages=1, kernels=False, max_rows=1)._host
    if CUDA:
        torch.cuda.synchronize()
    resident = load.engine.resident_adapters()
    assert resident
    for digest in resident:
        adapter = load.adapters[digest]
        pages = load.engine._memory.adapters._entries[digest].pages
        fresh.stage(adapter.manifest, adapter.path)
        with fresh.lend(digest) as staged:
            on_device = arena.pages[list(pages)].cpu()
            for part in staged.layout.parts:
                end = part.offset_bytes + (part.rank_end - part.rank_start) * part.num_columns * shape.dtype.itemsize
                expected = staged.blob[part.page, part.offset_bytes : end]
                assert torch.equal(on_device[part.page, part.offset_bytes : end], expected)
        fresh.unstage(digest)


def test_every_token_is_of_its_requests_adapter(tmp_path: Path) -> None:
    """Tight memory at a tiny size: tokens are exactly those of each request alone."""
    adapters = make_adapters(TINY, tmp_path)
    executor = build(TINY, num_pages=22 if CUDA else 12, kernels=True, max_rows=4)
    load = Load(
        executor,
        adapters,
        seed=1,
        max_running=4,
        max_step_tokens=48,
        max_host_pages=12,
        max_adapter_pages=None if CUDA else 6,
        max_ahead_pages=6,
    )
    with ThreadPoolExecutor(2) as staging:
        load.run(300 if CUDA else 10, at_once=6, staging=staging)
    load.check_identities()
    expected = alone(TINY, load)
    for request_id, tokens in load.tokens.items():
        assert tokens == expected[request_id][: len(tokens)], "stale KV, or another adapter's"
    check_resident_bytes(load, TINY)
    report = load.engine.load_report()
    assert report.adapter_loads + report.adapter_prefetches > len(load.engine.resident_adapters()), (
        "nothing was evicted"
    )
    if CUDA:
        assert load.num_stagings > len(adapters), "nothing was reloaded into host memory"
        assert report.adapter_prefetches
        assert load.engine.num_preemptions
        assert load.aborted
    executor.close()


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("graphs", [True, False])
def test_every_token_is_of_its_requests_adapter_at_size(graphs: bool, tmp_path: Path) -> None:
    adapters = make_adapters(LARGE, tmp_path)
    executor = build(LARGE, num_pages=1200, kernels=True, max_rows=64, graphs=graphs)
    num_pages = executor.adapter_pages(adapters[0].manifest)
    load = Load(
        executor,
        adapters,
        seed=2,
        max_running=64,
        max_step_tokens=256,
        max_host_pages=80 * num_pages,
        max_adapter_pages=48 * num_pages,
    )
    with ThreadPoolExecutor(4) as staging:
        load.run(3000, at_once=96, staging=staging)
    load.check_identities()
    check_resident_bytes(load, LARGE)
    report = load.engine.load_report()
    print(
        f"graphs={graphs} pages of an adapter={num_pages} stagings={load.num_stagings} loads={report.adapter_loads} "
        f"prefetches={report.adapter_prefetches} hits={report.adapter_hits} steps={report.steps} "
        f"preemptions={load.engine.num_preemptions} aborted={len(load.aborted)}"
    )
    assert load.num_stagings > len(adapters)
    assert report.adapter_loads + report.adapter_prefetches > 3 * len(adapters)
    executor.close()


class RecordingSampler(Sampler):
    """Keeps the logits of the last step."""

    logits: torch.Tensor

    def draw(self, logits_BV: torch.Tensor, slots: Sequence[int], *, last_token: torch.Tensor | None = None) -> Drawn:
        self.logits = logits_BV.clone()
        return super().draw(logits_BV, slots, last_token=last_token)


class Steps:
    """Plans by hand for one request in slot 0, whose KV lies in pages 0 to 2."""

    def __init__(self, adapter: Adapter, *, graphs: bool) -> None:
        spec = TINY.spec
        self.adapter = adapter
        self.sampler = RecordingSampler(spec, DEVICE)
        self.executor = GpuExecutor(
            spec,
            TINY.weights(DEVICE),
            Arena(spec, num_pages=64, page_size=16, dtype=TINY.dtype, device=DEVICE),
            self.sampler,
            max_rows=4,
            max_step_tokens=256,
            cuda_graphs=graphs,
        )
        if graphs:
            self.executor.warm_up()
        self.executor.stage_adapter(adapter.manifest, adapter.path)
        self.num_pages = self.executor.adapter_pages(adapter.manifest)
        self.known = list(range(2, 42))
        self.step_id = 0

    def submit(self, *, first: int, adapter: Digest | None) -> None:
        self.step_id += 1
        start = RowStart(
            slot=0,
            sampling=SamplingParams(max_tokens=100, seed=0, temperature=0.0),
            token_ids=tuple(self.known),
            num_prompt_tokens=40,
        )
        row = Row(
            slot=0, token_ids=tuple(self.known[first:]), start=first, pages=(0, 1, 2), adapter=adapter, samples=True
        )
        starts = () if first else (start,)
        self.executor.submit(StepPlan(step_id=self.step_id, releases=(), starts=starts, rows=(row,)))

    def collect(self) -> int:
        self.known.append(self.executor.collect().tokens[0].token_id)
        return self.known[-1]

    def load(self, first_page: int) -> None:
        pages = tuple(range(first_page, first_page + self.num_pages))
        self.executor.load_adapter(self.adapter.manifest.digest, pages)


def _hold_up(stream: torch.cuda.Stream | None) -> None:
    """The stream does nothing for about a tenth of a second."""
    assert stream is not None
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)


@pytest.mark.parametrize("call", ["submit", "collect"])
def test_after_a_failed_step_the_device_writes_no_more(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pages of void steps may go to an adapter at once, whose copy waits for nothing."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("a passing failure")

    steps = Steps(make_adapters(TINY, tmp_path)[0], graphs=False)
    steps.submit(first=0, adapter=None)
    steps.collect()
    if CUDA:
        _hold_up(torch.cuda.current_stream())
    steps.submit(first=40, adapter=None)
    if call == "submit":
        with monkeypatch.context() as broken:
            broken.setattr(steps.sampler, "draw", fail)
            with pytest.raises(RuntimeError, match="passing"):
                steps.submit(first=40, adapter=None)
        assert not CUDA or torch.cuda.current_stream().query()
        steps.collect()
    else:
        steps.submit(first=40, adapter=None)
        monkeypatch.setattr(steps.executor._in_flight[0].drawn, "result", fail)
        with pytest.raises(RuntimeError, match="passing"):
            steps.executor.collect()
        assert not CUDA or torch.cuda.current_stream().query()
        with pytest.raises(Conflict, match="in flight"):
            steps.executor.collect()
    steps.submit(first=40, adapter=None)
    steps.collect()


def test_an_adapter_whose_copy_fails_leaves_no_records_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("the copy failed")

    adapter = make_adapters(TINY, tmp_path)[0]
    steps = Steps(adapter, graphs=False)
    adapters = steps.executor._adapters
    with monkeypatch.context() as broken:
        broken.setattr(adapters, "_copy", fail)
        with pytest.raises(RuntimeError, match="copy failed"):
            steps.load(10)
    assert adapters._free.all()
    with pytest.raises(Conflict, match="not loaded"):
        adapters.get(adapter.manifest.digest)
    steps.load(10)
    steps.submit(first=0, adapter=adapter.manifest.digest)
    assert steps.collect() // (2 * DIRECTIONS) == adapter.identity


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("graphs", [True, False])
def test_a_step_waits_for_the_copy_of_its_adapter(graphs: bool, tmp_path: Path) -> None:
    adapter = make_adapters(TINY, tmp_path)[0]
    digest = adapter.manifest.digest
    steps = Steps(adapter, graphs=graphs)
    for first in (0, 40, 41):
        _hold_up(steps.executor._adapters._stream)
        steps.load(10 + first % 7)
        waits = steps.executor._adapters.arrivals([digest])
        assert waits, "the copy was done before anybody could wait for it"
        assert steps.executor._adapters.arrivals([digest]) == waits, "a step that fails leaves the wait to the next"
        steps.submit(first=first, adapter=digest)
        assert steps.collect() // (2 * DIRECTIONS) == adapter.identity
        steps.executor.drop_adapter(digest)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_pages_of_a_dropped_adapter_wait_for_its_copy_and_its_blob_stays_until_then(tmp_path: Path) -> None:
    """Dropped and unstaged at once, the copy still under way: it must not land on the KV that comes next, and the run
    in host memory must not be given to another adapter."""
    first, second = make_adapters(TINY, tmp_path)[:2]

    def logits(*, disturbed: bool) -> torch.Tensor:
        steps = Steps(first, graphs=False)
        if disturbed:
            _hold_up(steps.executor._adapters._stream)
            steps.load(0)
            steps.executor.unstage_adapter(first.manifest.digest)
            steps.executor.stage_adapter(second.manifest, second.path)
            with steps.executor._host.lend(second.manifest.digest) as staged:
                assert staged.run._first == steps.num_pages, "the run of a copy under way was given away"
            steps.executor.drop_adapter(first.manifest.digest)
        steps.submit(first=0, adapter=None)
        steps.collect()
        steps.submit(first=40, adapter=None)
        steps.collect()
        torch.cuda.synchronize()
        return steps.sampler.logits.cpu()

    assert torch.equal(logits(disturbed=True), logits(disturbed=False))


_SYNCHRONISES = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("graphs", [True, False])
def test_only_the_read_back_of_tokens_waits_for_the_device(graphs: bool, tmp_path: Path) -> None:
    """In the profiler's timeline of a load with adapters that come and go: nothing synchronises within ``submit`` or
    ``load_adapter`` unless a graph is captured there, and ``collect`` waits for one event."""
    adapters = make_adapters(TINY, tmp_path)
    executor = build(TINY, num_pages=64, kernels=True, max_rows=8, graphs=graphs)
    assert isinstance(executor, GpuExecutor)
    load = Load(executor, adapters, seed=3, max_running=8, max_step_tokens=64, max_adapter_pages=24)
    captures = 0

    def marked(name: str) -> None:
        original = getattr(executor, name)

        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal captures
            known = len(executor._graphs.keys)
            with torch.profiler.record_function(f"executor.{name}"):
                result = original(*arguments, **options)
            if len(executor._graphs.keys) != known:
                captures += 1
            return result

        setattr(executor, name, call)

    with ThreadPoolExecutor(1) as staging:
        load.run(200, at_once=12, staging=staging)
        for name in ("submit", "load_adapter", "collect"):
            marked(name)
        with torch.profiler.profile() as profile:
            load.run(300, at_once=12, staging=staging)
    events = profile.events()
    spans = {
        name: [
            event.time_range for event in events if event.name == f"executor.{name}" and event.device_type.name == "CPU"
        ]
        for name in ("submit", "load_adapter", "collect")
    }
    within: dict[str, Counter[str]] = {name: Counter() for name in spans}
    for event in events:
        if event.name.startswith(_SYNCHRONISES) and not event.name.endswith("Async"):
            for name, ranges in spans.items():
                if any(span.start <= event.time_range.start <= span.end for span in ranges):
                    within[name][event.name] += 1
    print(f"graphs={graphs} captures={captures}", {name: len(ranges) for name, ranges in spans.items()}, within)
    assert min(len(ranges) for ranges in spans.values()) > 10
    assert set(within["collect"]) <= {"cudaEventSynchronize"}
    assert within["load_adapter"] == Counter()
    if captures == 0:
        assert within["submit"] == Counter()
    load.check_identities()
    executor.close()
