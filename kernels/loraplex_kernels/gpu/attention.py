"""Attention over KV pages on the GPU: parts of the contexts of decode rows, prefill tiles with a cached prefix.

Keys and values, the step's own included, are read from the pages alone; slots that no token has written may hold
anything. What is to be done comes from ``attention_tiles``. Grids come from host numbers, nothing is allocated and
nothing is read back, so that both run inside CUDA graphs. A result is bit-equal from run to run; that of a decode row
depends on how it is cut, hence on the rows beside it.
Legend: T tokens, B rows, N query heads, G KV heads, Q = N / G, H head dim, C >= N * H columns of ``q``, P pages.
"""

import math
from dataclasses import dataclass

import torch
import triton

from loraplex_kernels.gpu.attention_kernels import decode_kernel, prefill_kernel
from loraplex_kernels.gpu.attention_tiles import BLOCK_PARTS, PART_FIELDS
from loraplex_kernels.gpu.tuning import exact
from loraplex_kernels.kv import KvLayout

_LOG2_E = math.log2(math.e)
_MIN_DOT_ROWS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionBlocks:
    """Launch parameters: ``rows`` of queries (tokens times Q; prefill only) and ``keys`` of one block."""

    rows: int = _MIN_DOT_ROWS
    keys: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    """Of a thread (prefill only): fewer let more programs share an SM. None: as many as the compiler likes."""


_DECODE_BLOCKS = AttentionBlocks(keys=32, num_warps=4, num_stages=5)
_DECODE_BLOCKS_FP32 = AttentionBlocks(keys=32, num_warps=4, num_stages=2)
# Four programs fit an SM: those of short prompts mostly wait for their first pages.
_PREFILL_BLOCKS = AttentionBlocks(rows=64, keys=32, num_warps=4, num_stages=2, max_registers=128)
_PREFILL_BLOCKS_H64 = AttentionBlocks(rows=128, keys=64, num_warps=4, num_stages=3)
_PREFILL_BLOCKS_FP32 = AttentionBlocks(rows=32, keys=16, num_warps=8, num_stages=2)


def decode_blocks(layout: KvLayout, dtype: torch.dtype) -> AttentionBlocks:
    return _DECODE_BLOCKS if dtype.itemsize == 2 else _DECODE_BLOCKS_FP32


def prefill_blocks(layout: KvLayout, dtype: torch.dtype) -> AttentionBlocks:
    if dtype.itemsize > 2:
        return _PREFILL_BLOCKS_FP32
    return _PREFILL_BLOCKS if layout.head_dim > 64 else _PREFILL_BLOCKS_H64


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeScratch:
    """Parts of rows that have several. Launches that follow each other on a stream may share one."""

    partial: torch.Tensor
    """(parts, N, H) fp32."""
    lse: torch.Tensor
    """(parts, N) fp32: log2-sum-exp2 of a part's scores."""
    arrived: torch.Tensor
    """(B, G) int32: parts of a row that are done; 0 between launches."""


def decode_scratch(
    num_parts: int, num_rows: int, num_heads: int, layout: KvLayout, device: torch.device
) -> DecodeScratch:
    return DecodeScratch(
        partial=torch.empty((num_parts, num_heads, layout.head_dim), dtype=torch.float32, device=device),
        lse=torch.empty((num_parts, num_heads), dtype=torch.float32, device=device),
        arrived=torch.zeros((num_rows, layout.num_kv_heads), dtype=torch.int32, device=device),
    )


def decode_attention(
    q: torch.Tensor,
    parts: torch.Tensor,
    page_table: torch.Tensor,
    arena: torch.Tensor,
    layout: KvLayout,
    layer: int,
    out: torch.Tensor,
    scratch: DecodeScratch,
    *,
    scale: float,
    blocks: AttentionBlocks | None = None,
) -> None:
    """Rows of one query token, each at the last position of its context.

    ``q``: (T, C), the fused qkv buffer: its first N * H columns are the rotated queries. ``parts``: (parts,
    PART_FIELDS) int32 from ``build_decode_parts``; zeros behind them do nothing. Tokens of no part are neither read nor
    written. ``page_table``: (slots, pages) int32. ``arena``: flat, pages of ``layout``, in the dtype of ``q``. ``out``:
    (T, N * H). ``scratch``: of ``decode_scratch`` for at least these parts and rows.
    """
    num_heads = _check(q, page_table, arena, layout, out, scale)
    if blocks is None:
        blocks = decode_blocks(layout, q.dtype)
    assert parts.shape[1:] == (PART_FIELDS,), f"a part has {PART_FIELDS} fields"
    assert parts.is_contiguous(), "parts are dense"
    assert scratch.partial.shape[0] >= parts.shape[0], "the scratch is too small"
    if parts.shape[0] == 0:
        return
    group = num_heads // layout.num_kv_heads
    decode_kernel[(layout.num_kv_heads, parts.shape[0])](
        q,
        q.stride(0),
        parts,
        page_table,
        page_table.stride(0),
        arena,
        layer,
        out,
        out.stride(0),
        scratch.partial,
        scratch.lse,
        scratch.arrived,
        scale * _LOG2_E,
        GROUP=group,
        PART_FIELDS=PART_FIELDS,
        NUM_LAYERS=layout.num_layers,
        NUM_KV_HEADS=layout.num_kv_heads,
        PAGE_SIZE=layout.page_size,
        HEAD_DIM=layout.head_dim,
        BLOCK_GROUP=max(_MIN_DOT_ROWS, triton.next_power_of_2(group)),
        BLOCK_QUERIES=triton.next_power_of_2(group),
        BLOCK_KEYS=blocks.keys,
        BLOCK_PARTS=BLOCK_PARTS,
        NUM_STAGES=blocks.num_stages,
        EXACT=exact(q.dtype),
        num_warps=blocks.num_warps,
    )


def prefill_block_tokens(layout: KvLayout, num_heads: int, dtype: torch.dtype) -> int:
    """Tokens of a prefill tile: what ``build_prefill_tiles`` cuts into and ``prefill_attention`` takes."""
    return prefill_blocks(layout, dtype).rows // (num_heads // layout.num_kv_heads)


def prefill_attention(
    q: torch.Tensor,
    tiles: torch.Tensor,
    page_table: torch.Tensor,
    arena: torch.Tensor,
    layout: KvLayout,
    layer: int,
    out: torch.Tensor,
    *,
    block_tokens: int,
    scale: float,
    sliding_window: int | None = None,
    blocks: AttentionBlocks | None = None,
) -> None:
    """Rows of several tokens, causal, after a prefix of any length that is in the pages already.

    ``tiles``: (tiles, 4) int32 from ``build_prefill_tiles`` with the same ``block_tokens``, at most those of
    ``prefill_block_tokens``; a tile of zeros does nothing. Tokens of no tile are neither read nor written. The other
    arguments are those of ``decode_attention``.
    """
    num_heads = _check(q, page_table, arena, layout, out, scale)
    group = num_heads // layout.num_kv_heads
    if blocks is None:
        blocks = prefill_blocks(layout, q.dtype)
    assert block_tokens * group <= blocks.rows, "a tile has more queries than the block has rows"
    assert tiles.shape[1:] == (4,), "a tile has four fields"
    assert tiles.is_contiguous(), "tiles are dense"
    assert sliding_window is None or sliding_window > 0, "a token sees itself"
    if tiles.shape[0] == 0:
        return
    prefill_kernel[(layout.num_kv_heads, tiles.shape[0])](
        q,
        q.stride(0),
        tiles,
        page_table,
        page_table.stride(0),
        arena,
        layer,
        out,
        out.stride(0),
        scale * _LOG2_E,
        GROUP=group,
        WINDOW=sliding_window or 0,
        NUM_LAYERS=layout.num_layers,
        NUM_KV_HEADS=layout.num_kv_heads,
        PAGE_SIZE=layout.page_size,
        HEAD_DIM=layout.head_dim,
        BLOCK_ROWS=blocks.rows,
        BLOCK_KEYS=blocks.keys,
        NUM_STAGES=blocks.num_stages,
        EXACT=exact(q.dtype),
        num_warps=blocks.num_warps,
        maxnreg=blocks.max_registers,
    )


def _check(
    q: torch.Tensor,
    page_table: torch.Tensor,
    arena: torch.Tensor,
    layout: KvLayout,
    out: torch.Tensor,
    scale: float,
) -> int:
    """The number of query heads."""
    head_dim = layout.head_dim
    num_heads = out.shape[1] // head_dim
    assert out.shape[1] == num_heads * head_dim <= q.shape[1], "the first columns of q are those of the output"
    assert num_heads % layout.num_kv_heads == 0, "query heads are a multiple of KV heads"
    assert head_dim == triton.next_power_of_2(head_dim) >= _MIN_DOT_ROWS, "the head dim is a power of two from 16 on"
    assert q.dtype == arena.dtype == out.dtype, "queries, pages and output have one dtype"
    assert q.stride(1) == out.stride(1) == page_table.stride(1) == arena.stride(0) == 1, "the last dimension is dense"
    assert page_table.dtype == torch.int32, "page ids are int32"
    assert scale > 0, "the running maximum is that of scaled scores"
    return num_heads
