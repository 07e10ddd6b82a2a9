"""Paged attention on the GPU, or under Triton's interpreter on tiny shapes, against the fp64 twins.

Every slot that no query of the case sees holds NaN, and so does every output before the call.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from loraplex_kernels import AttentionRow, KvLayout, paged_attention, plan_attention, view_kv_pages
from loraplex_kernels.gpu import attention
from loraplex_kernels.gpu.attention import AttentionBlocks, DecodeScratch, decode_scratch, prefill_block_tokens
from loraplex_kernels.gpu.attention_tiles import PART_FIELDS, DecodeCut, build_decode_parts, build_prefill_tiles
from loraplex_kernels.gpu.twins import attention as twins

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAN = float("nan")
LAYER = 1
DECODE = AttentionBlocks(keys=16, num_warps=4, num_stages=3)
PREFILL = AttentionBlocks(rows=32, keys=16, num_warps=4, num_stages=3)
HEADS = [(8, 2), (6, 2), (2, 2)]


class World:
    """Pages of several requests, slot i holding request i; keys of ``spans[i]`` exist, all others are NaN."""

    def __init__(
        self,
        spans: list[tuple[int, int]],
        heads: int,
        kv_heads: int,
        *,
        head_dim: int = 16,
        page_size: int = 4,
        num_layers: int = 2,
        dtype: torch.dtype = torch.float32,
        spare_pages: int = 3,
    ) -> None:
        self.layout = KvLayout(num_layers=num_layers, num_kv_heads=kv_heads, head_dim=head_dim, page_size=page_size)
        self.heads, self.dtype = heads, dtype
        self.scale = head_dim**-0.5
        counts = [-(-end // page_size) for _, end in spans]
        num_pages = sum(counts) + spare_pages
        # The last pages first, so that a big arena is used at its end; page 0 stays NaN and fills the table.
        free = [*range(1, num_pages)]
        self.arena = torch.full((num_pages * self.layout.elements_per_page,), NAN, dtype=dtype, device=DEVICE)
        self.table = torch.zeros((len(spans), max(counts) + 2), dtype=torch.int32, device=DEVICE)
        pages = self.arena.view(num_pages, num_layers, 2, kv_heads, page_size, head_dim)
        for slot, ((first, end), count) in enumerate(zip(spans, counts, strict=True)):
            own = [free.pop() for _ in range(count)]
            own = [own[i] for i in torch.randperm(count)]
            self.table[slot, :count] = torch.tensor(own, dtype=torch.int32)
            for position in range(first, end):
                # Scores of a spread that makes the softmax far from uniform.
                pages[own[position // page_size], LAYER, :, :, position % page_size] = (
                    2 * torch.randn(2, kv_heads, head_dim, device=DEVICE)
                ).to(dtype)

    def queries(self, num_tokens: int) -> torch.Tensor:
        """A fused qkv buffer whose keys and values, not read, are NaN."""
        q_size, kv_size = self.heads * self.layout.head_dim, 2 * self.layout.num_kv_heads * self.layout.head_dim
        qkv = torch.full((num_tokens, q_size + kv_size), NAN, dtype=self.dtype, device=DEVICE)
        qkv[:, :q_size] = torch.randn(num_tokens, q_size, device=DEVICE).to(self.dtype)
        return qkv

    def output(self, num_tokens: int) -> torch.Tensor:
        return torch.full((num_tokens, self.heads * self.layout.head_dim), NAN, dtype=self.dtype, device=DEVICE)

    def scratch(self, num_parts: int, num_rows: int) -> DecodeScratch:
        scratch = decode_scratch(num_parts, num_rows, self.heads, self.layout, DEVICE)
        scratch.partial.fill_(NAN)
        scratch.lse.fill_(NAN)
        return scratch


def check(out: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    written = ~expected.isnan()
    assert torch.equal(out.isnan(), ~written)
    error = (out[written].double() - expected[written].double()).norm() / expected[written].double().norm()
    assert float(error) <= tolerance


def parts_of(
    lengths: list[int],
    slots: list[int],
    *,
    concurrency: int,
    per_row: int | None = None,
    window: int | None = None,
    tokens: list[int] | None = None,
    dead: int = 0,
    block_keys: int = 16,
) -> torch.Tensor:
    """On the device; ``dead``: parts of zeros behind them."""
    cut = DecodeCut(block_keys=block_keys, concurrency=concurrency, window=window, per_row=per_row)
    parts = build_decode_parts(lengths, range(len(slots)) if tokens is None else tokens, slots, cut)
    return torch.from_numpy(np.pad(parts, ((0, dead), (0, 0)))).to(DEVICE)


def decode_both(
    world: World,
    slots: list[int],
    lengths: list[int],
    *,
    concurrency: int = 1,
    per_row: int | None = None,
    window: int | None = None,
    tokens: list[int] | None = None,
    num_tokens: int | None = None,
    blocks: AttentionBlocks | None = DECODE,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens = num_tokens or len(slots)
    q, out, expected = world.queries(num_tokens), world.output(num_tokens), world.output(num_tokens)
    parts = parts_of(lengths, slots, concurrency=concurrency, window=window, tokens=tokens, per_row=per_row, dead=2)
    scratch = world.scratch(len(parts), len(slots))
    for function, result in ((attention.decode_attention, out), (twins.decode_attention, expected)):
        function(
            q, parts, world.table, world.arena, world.layout, LAYER, result, scratch, scale=world.scale, blocks=blocks
        )
    assert not scratch.arrived.any()
    return out, expected


def prefill_both(
    world: World,
    starts: list[int],
    counts: list[int],
    *,
    window: int | None = None,
    dead_tiles: int = 0,
    blocks: AttentionBlocks | None = PREFILL,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row i of slot i; one token between two rows belongs to no tile."""
    firsts = [sum(counts[:row]) + row for row in range(len(counts))]
    num_tokens = firsts[-1] + counts[-1] + 1
    rows = blocks.rows if blocks else None
    group = world.heads // world.layout.num_kv_heads
    block_tokens = rows // group if rows else prefill_block_tokens(world.layout, world.heads, world.dtype)
    host_tiles = build_prefill_tiles(starts, counts, firsts, range(len(counts)), block_tokens)
    host_tiles = np.concatenate([host_tiles, np.zeros((dead_tiles, 4), np.int32)])
    tiles = torch.from_numpy(host_tiles).to(DEVICE)
    q, out, expected = world.queries(num_tokens), world.output(num_tokens), world.output(num_tokens)
    for function, result in ((attention.prefill_attention, out), (twins.prefill_attention, expected)):
        function(
            q,
            tiles,
            world.table,
            world.arena,
            world.layout,
            LAYER,
            result,
            block_tokens=block_tokens,
            scale=world.scale,
            sliding_window=window,
            blocks=blocks,
        )
    return out, expected


def spans_of(ends: list[int], window: int | None, starts: list[int] | None = None) -> list[tuple[int, int]]:
    """What queries from ``starts`` (decode: the last position) on see of each request."""
    firsts = [end - 1 for end in ends] if starts is None else starts
    return [(0 if window is None else max(0, start - window + 1), end) for start, end in zip(firsts, ends, strict=True)]


@pytest.mark.parametrize(
    ("heads", "window", "concurrency"),
    [
        *((heads, None, 1) for heads in HEADS),
        (HEADS[0], 5, 1),
        (HEADS[1], 18, 1),
        (HEADS[2], 1, 1),
        (HEADS[0], None, 3),
        (HEADS[1], None, 8),
        (HEADS[2], None, 4),
        (HEADS[1], 18, 8),
    ],
)
def test_decode(heads: tuple[int, int], window: int | None, concurrency: int) -> None:
    """Contexts of one key, of part of a page, of a page and of several blocks."""
    ends = [37, 1, 3, 4, 16, 66]
    world = World(spans_of(ends, window), *heads)
    check(*decode_both(world, [*range(len(ends))], ends, concurrency=concurrency, window=window))


def test_a_row_of_more_parts_than_are_added_up_at_a_time() -> None:
    world = World(spans_of([340, 20], None), 2, 1)
    assert parts_of([340, 20], [0, 1], concurrency=1, per_row=22)[0].tolist() == [0, 0, 0, 16, 0, 22, 0, 0]
    check(*decode_both(world, [0, 1], [340, 20], per_row=22))


@pytest.mark.parametrize("concurrency", [1, 4])
def test_padding_rows_get_zeros(concurrency: int) -> None:
    world = World(spans_of([21], None), 4, 2)
    out, expected = decode_both(world, [-1, 0, -1], [0, 21, 0], concurrency=concurrency)
    assert bool((out[[0, 2]] == 0).all())
    check(out, expected)


@pytest.mark.parametrize("concurrency", [1, 2])
def test_decode_rows_of_a_mixed_step_write_their_own_tokens_alone(concurrency: int) -> None:
    world = World(spans_of([9, 30], None), 4, 2)
    out, expected = decode_both(world, [1, 0], [30, 9], tokens=[5, 2], num_tokens=7, concurrency=concurrency)
    assert out[:, 0].isnan().tolist() == [True, True, False, True, True, False, True]
    check(out, expected)


@pytest.mark.parametrize("window", [None, 3, 20])
@pytest.mark.parametrize("heads", HEADS)
def test_prefill(heads: tuple[int, int], window: int | None) -> None:
    """A prompt from its start, chunks after prefixes that end inside a page and at a block's end; a dead tile."""
    starts, counts = [0, 7, 32], [21, 2, 34]
    ends = [start + count for start, count in zip(starts, counts, strict=True)]
    world = World(spans_of(ends, window, starts), *heads)
    check(*prefill_both(world, starts, counts, window=window, dead_tiles=1))


def test_bf16() -> None:
    world = World(spans_of([40, 17], None), 6, 2, dtype=torch.bfloat16)
    check(*decode_both(world, [0, 1], [40, 17], concurrency=3), tolerance=1e-2)
    check(*prefill_both(world, [19, 0], [21, 17]), tolerance=1e-2)


def test_default_blocks() -> None:
    world = World(spans_of([50, 2], None), 4, 2, page_size=16)
    check(*decode_both(world, [0, 1], [50, 2], blocks=None))
    check(*prefill_both(world, [11, 0], [39, 2], blocks=None))


@pytest.mark.parametrize("window", [None, 6])
def test_the_twins_agree_with_the_cpu_operation(window: int | None) -> None:
    starts, counts = [28, 0, 13], [1, 9, 12]
    ends = [start + count for start, count in zip(starts, counts, strict=True)]
    world = World([(0, end) for end in ends], 6, 2)
    arena = world.arena.nan_to_num(nan=0.0)
    q, expected = world.queries(22), world.output(22)
    rows = [
        AttentionRow(first_token=first, num_tokens=count, start=start, pages=world.table[slot].tolist())
        for slot, (first, start, count) in enumerate(zip([0, 1, 10], starts, counts, strict=True))
    ]
    # Chunks without a prefix take their keys from the buffer: there they are the pages' own.
    pages = arena.view(-1, 2, 2, 2, 4, 16)
    for row in rows:
        for index in range(row.num_tokens):
            position = row.start + index
            q[row.first_token + index, 96:] = pages[row.pages[position // 4], LAYER, :, :, position % 4].flatten()
    plan = plan_attention(
        rows, layout=world.layout, num_heads=6, sliding_window=window, dtype=torch.float32, device=DEVICE
    )
    out = paged_attention(q, view_kv_pages(arena, world.layout), LAYER, plan)
    tiles = torch.from_numpy(build_prefill_tiles(starts[1:], counts[1:], [1, 10], [1, 2], 5)).to(DEVICE)
    shared = (world.table, world.arena, world.layout, LAYER, expected)
    twins.decode_attention(q, parts_of([29], [0], concurrency=2, window=window), *shared, None, scale=world.scale)
    twins.prefill_attention(q, tiles, *shared, block_tokens=5, scale=world.scale, sliding_window=window)
    check(out, expected)


def test_the_benchmark_runs() -> None:
    script = Path(__file__).parents[3] / "kernels/benchmarks/bench_attention.py"
    interpreted = {} if DEVICE.type == "cuda" else {"TRITON_INTERPRET": "1"}
    environment = os.environ | interpreted
    done = subprocess.run([sys.executable, script, "--tiny"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"op": "decode"' in done.stdout
    assert '"op": "prefill"' in done.stdout


LLAMA = {"head_dim": 128, "page_size": 16, "dtype": torch.bfloat16}


@pytest.mark.gpu
@pytest.mark.parametrize("concurrency", [1, 24, 100])
@pytest.mark.parametrize("window", [None, 700])
def test_decode_of_llama_shapes(concurrency: int, window: int | None) -> None:
    ends = [320, 1, 65, 1024, 2049, 511]
    world = World(spans_of(ends, window), 32, 8, **LLAMA)
    check(*decode_both(world, [*range(6)], ends, concurrency=concurrency, window=window, blocks=None), tolerance=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "head_dim"), [((32, 8), 128), ((9, 3), 64), ((4, 4), 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("window", [None, 200])
def test_prefill_of_model_shapes(heads: tuple[int, int], head_dim: int, dtype: torch.dtype, window: int | None) -> None:
    starts, counts = [0, 1000, 77, 512], [257, 300, 2, 64]
    ends = [start + count for start, count in zip(starts, counts, strict=True)]
    world = World(spans_of(ends, window, starts), *heads, head_dim=head_dim, page_size=16, dtype=dtype)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    check(*prefill_both(world, starts, counts, window=window, blocks=None), tolerance=tolerance)
    check(*decode_both(world, [*range(4)], ends, blocks=None, window=window, concurrency=24), tolerance=tolerance)


@pytest.mark.gpu
def test_pages_past_two_billion_elements() -> None:
    # 2 MiB a page: 2300 of them are 2.4 billion elements; the requests get the last ones.
    world = World(spans_of([100, 33], None), 32, 8, num_layers=32, spare_pages=2300, **LLAMA)
    assert int(world.table[0, 0]) * world.layout.elements_per_page > 2**31
    check(*decode_both(world, [0, 1], [100, 33], blocks=None, concurrency=8), tolerance=1e-2)
    check(*prefill_both(world, [50, 0], [50, 33], blocks=None), tolerance=1e-2)


@pytest.mark.gpu
def test_results_are_bit_equal_from_run_to_run() -> None:
    """Whichever of a row's parts is done last."""
    ends = [9000, 333, 2000, 5]
    world = World(spans_of(ends, None), 32, 8, **LLAMA)
    q, parts = world.queries(4), parts_of(ends, [0, 1, 2, 3], concurrency=60, block_keys=64)
    scratch = world.scratch(len(parts), 4)
    results = []
    for _ in range(200):
        out = world.output(4)
        attention.decode_attention(
            q, parts, world.table, world.arena, world.layout, LAYER, out, scratch, scale=world.scale
        )
        results.append(out)
    assert not results[0].isnan().any()
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.gpu
def test_a_captured_graph_serves_other_contexts() -> None:
    world = World(spans_of([900, 333, 5], None), 32, 8, **LLAMA)
    q, out, expected = world.queries(3), world.output(3), world.output(3)
    capacity = DecodeCut(block_keys=64, concurrency=8).capacity(3)
    parts = torch.zeros((capacity, PART_FIELDS), dtype=torch.int32, device=DEVICE)
    scratch = world.scratch(capacity, 3)
    args = (world.table, world.arena, world.layout, LAYER)
    attention.decode_attention(q, parts, *args, out, scratch, scale=world.scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attention.decode_attention(q, parts, *args, out, scratch, scale=world.scale)
    for ends, own in (([900, 333, 5], [0, 1, 2]), ([333, 0, 12], [1, -1, 0])):
        parts.zero_()
        live = parts_of(ends, own, concurrency=8, block_keys=64)
        parts[: len(live)].copy_(live)
        out.fill_(NAN)
        graph.replay()
        twins.decode_attention(q, parts, *args, expected, scratch, scale=world.scale)
        check(out, expected, tolerance=1e-2)
