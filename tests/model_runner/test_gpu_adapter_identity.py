"""No request is ever served by another adapter: weights whose tokens say which adapter computed them, under random load
with eviction, replacement, reloading, preemption, aborts, two steps in flight and graph replay."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from loraplex.core.ids import RequestId
from loraplex.core.step import Row, RowStart, StepPlan

pytest.importorskip("triton")

from tests.model_runner.identity import CUDA, TINY, Load, Shape, build, make_adapters

LARGE = Shape(model="llama3-1b", num_layers=8, num_adapters=64, versions=2, dtype=torch.bfloat16)


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
        max_host_bytes=12 * executor.arena.page_bytes,
        max_adapter_bytes=None if CUDA else 6 * executor.arena.page_bytes,
        max_ahead_bytes=6 * executor.arena.page_bytes,
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
    adapter_bytes = num_pages * executor.arena.page_bytes
    load = Load(
        executor,
        adapters,
        seed=2,
        max_running=64,
        max_step_tokens=256,
        max_host_bytes=80 * adapter_bytes,
        max_adapter_bytes=48 * adapter_bytes,
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
