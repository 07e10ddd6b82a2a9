"""Copies of adapters beside the steps: who waits for them, and what happens when one or the other fails."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from loraplex.core.errors import Conflict
from loraplex.core.ids import Digest
from loraplex.core.request import SamplingParams
from loraplex.core.step import Row, RowStart, StepPlan
from loraplex.model_runner.arena import Arena
from loraplex.model_runner.drawn import Drawn
from loraplex.model_runner.sampler import Sampler
from loraplex.model_runner.shard import Shard

pytest.importorskip("triton")
from loraplex.model_runner.gpu.executor import GpuExecutor

from tests.model_runner.identity import CUDA, DEVICE, DIRECTIONS, TINY, Adapter, Load, build, make_adapters


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
            Shard.whole(spec),
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
    cap = 24 * executor.arena.page_bytes
    load = Load(executor, adapters, seed=3, max_running=8, max_step_tokens=64, max_adapter_bytes=cap)
    captures = 0

    def marked(name: str) -> None:
        original = getattr(executor, name)

        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal captures
            known = executor._graphs.num_captured
            with torch.profiler.record_function(f"executor.{name}"):
                result = original(*arguments, **options)
            if executor._graphs.num_captured != known:
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
