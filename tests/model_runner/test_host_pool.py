"""Runs of host pages: never two owners of a page, none lost, none reused under a reader or a copy on the device."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from loraplex.bench.staging import write_random_adapter
from loraplex.core.adapter import AdapterBlock, AdapterManifest
from loraplex.core.errors import BadAdapter, Conflict
from loraplex.core.ids import BaseModelId, Digest
from loraplex.model_runner.host_adapters import HostAdapters
from loraplex.model_runner.host_pool import HostPool, HostRun
from loraplex.model_runner.random_models import random_spec
from loraplex.model_runner.shard import Shard

PAGE_BYTES = 4096
SPEC = random_spec("tiny-llama", BaseModelId("base"))


class Copy:
    """A copy on a device, done when we say so."""

    def __init__(self) -> None:
        self.done = False
        self.awaited = False

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.done = self.awaited = True


class PoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = HostPool(page_bytes=PAGE_BYTES, pin=False, slab_bytes=16 * PAGE_BYTES)
        self.mark = 0
        self.live: list[tuple[HostRun, int]] = []
        self.leaving: list[tuple[HostRun, int]] = []
        """Given back, but read or copied."""
        self.held: dict[HostRun, int] = {}
        self.copies: dict[HostRun, list[Copy]] = {}

    @rule(num_pages=st.integers(1, 20))
    def take(self, num_pages: int) -> None:
        run = self.pool.take(num_pages)
        assert run.pages.shape == (num_pages, PAGE_BYTES)
        self.mark += 1
        run.pages.fill_(self.mark % 256)
        self.live.append((run, self.mark % 256))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), copies=st.booleans())
    def read(self, data: st.DataObject, copies: bool) -> None:
        run, _ = data.draw(st.sampled_from(self.live))
        self.pool.hold(run)
        self.held[run] = self.held.get(run, 0) + 1
        if copies:
            copy = Copy()
            self.copies.setdefault(run, []).append(copy)
            run.copied_when(copy)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def end_read(self, data: st.DataObject) -> None:
        run = data.draw(st.sampled_from(list(self.held)))
        self.pool.let_go(run)
        self.held[run] -= 1
        if self.held[run] == 0:
            del self.held[run]

    @precondition(lambda self: self.copies)
    @rule(data=st.data())
    def end_copy(self, data: st.DataObject) -> None:
        run = data.draw(st.sampled_from(list(self.copies)))
        self.copies[run].pop().done = True
        if not self.copies[run]:
            del self.copies[run]

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.live) - 1))
        run, mark = self.live.pop(index)
        self.leaving.append((run, mark))
        self.pool.give_back(run)

    @invariant()
    def nobody_elses_bytes_change(self) -> None:
        self.pool.validate()
        self.leaving = [(run, mark) for run, mark in self.leaving if run in self.held or run in self.copies]
        for run, mark in (*self.live, *self.leaving):
            assert (run.pages == mark).all()

    def teardown(self) -> None:
        for run in tuple(self.held):
            for _ in range(self.held.pop(run)):
                self.pool.let_go(run)
        for copies in self.copies.values():
            for copy in copies:
                copy.done = True
        for run, _ in self.live:
            self.pool.give_back(run)
        size = self.pool.num_bytes
        if size:
            self.pool.take(16)
            assert self.pool.num_bytes == size, "all was free, and joined, and yet the pool grew"
        self.pool.validate()


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_slabs_are_cut_tightly_and_a_large_run_gets_its_own() -> None:
    pool = HostPool(page_bytes=PAGE_BYTES, pin=False, slab_bytes=10 * PAGE_BYTES)
    runs = [pool.take(3) for _ in range(3)]
    assert pool.num_bytes == 10 * PAGE_BYTES
    large = pool.take(25)
    assert pool.num_bytes == 35 * PAGE_BYTES
    pool.give_back(large)
    for run in runs:
        pool.give_back(run)
    assert [len(pool.take(count).pages) for count in (10, 25)] == [10, 25]
    assert pool.num_bytes == 35 * PAGE_BYTES


def test_the_end_waits_for_copies() -> None:
    pool = HostPool(page_bytes=PAGE_BYTES, pin=False)
    run, copy = pool.take(1), Copy()
    pool.hold(run)
    run.copied_when(copy)
    pool.let_go(run)
    pool.give_back(run)
    pool.close()
    assert copy.awaited


def test_many_threads_take_and_give_back() -> None:
    pool = HostPool(page_bytes=PAGE_BYTES, pin=False, slab_bytes=8 * PAGE_BYTES)
    wrong: list[int] = []

    def churn(mark: int) -> None:
        generator = np.random.default_rng(mark)
        for _ in range(200):
            run = pool.take(int(generator.integers(1, 6)))
            run.pages.fill_(mark)
            if not (run.pages == mark).all():
                wrong.append(mark)
            pool.give_back(run)

    threads = [threading.Thread(target=churn, args=(mark,)) for mark in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    pool.validate()


def _manifest(name: str, lora_rank: int, scale: float) -> AdapterManifest:
    blocks = tuple(
        AdapterBlock(layer=layer, module=module, lora_rank=lora_rank, scale=scale)
        for layer in range(SPEC.num_layers)
        for module in ("q_proj", "v_proj", "down_proj")
    )
    return AdapterManifest(digest=Digest(name), base_model_id=SPEC.base_model_id, blocks=blocks, num_bytes=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("file_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_blob_does_not_depend_on_what_its_pages_held(
    dtype: torch.dtype, file_dtype: torch.dtype, tmp_path: Path
) -> None:
    """Rank 5 leaves padding; every element of it is zero, every other one is the file's, rounded once."""
    path = tmp_path / "adapter.safetensors"
    manifest = _manifest("a", 5, 0.3)
    write_random_adapter(manifest, SPEC, path, file_dtype)
    page_bytes = 16 * SPEC.kv_elements_per_token * dtype.itemsize
    blobs = []
    for rubbish in (0, 255):
        host = HostAdapters(Shard.whole(SPEC), page_bytes=page_bytes, dtype=dtype, pin=False)
        num_pages = host.layout(manifest).num_pages
        run = host._pool.take(num_pages)
        run.pages.fill_(rubbish)
        host._pool.give_back(run)
        host.stage(manifest, str(path))
        with host.lend(manifest.digest) as staged:
            parts = [
                staged.blob[p.page, p.offset_bytes :][: (p.rank_end - p.rank_start) * p.num_columns * dtype.itemsize]
                for p in staged.layout.parts
            ]
        blobs.append(torch.cat(parts).view(dtype))
    assert torch.equal(*blobs)
    elements = sum(5 * sum(SPEC.projection_shape(block.module)) for block in manifest.blocks)
    assert abs(int(blobs[0].count_nonzero()) - elements) <= 2, "normal numbers are hardly ever 0"


def test_a_bad_file_leaves_no_pages_behind_and_a_lent_blob_outlives_its_adapter(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    good, bad = _manifest("good", 8, 1.0), _manifest("bad", 16, 1.0)
    write_random_adapter(good, SPEC, path, torch.float32)
    host = HostAdapters(Shard.whole(SPEC), page_bytes=PAGE_BYTES, dtype=torch.float32, pin=False)
    with pytest.raises(BadAdapter):
        host.stage(bad, str(path))
    host._pool.validate()
    assert host._pool._num_taken == 0
    host.stage(good, str(path))
    with host.lend(good.digest) as staged:
        before = staged.blob.clone()
        host.unstage(good.digest)
        host.stage_random(_manifest("other", 8, 1.0), 0)
        assert torch.equal(staged.blob, before)
    with pytest.raises(Conflict, match="not staged"), host.lend(good.digest):
        pass
