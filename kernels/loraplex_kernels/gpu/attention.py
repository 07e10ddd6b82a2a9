"""Attention over KV pages on the GPU: decode rows split over their context, prefill tiles with a cached prefix.

Keys and values, the step's own included, are read from the pages alone; slots that no token has written may hold
anything. Grids come from host numbers, nothing is allocated and nothing is read back, so that both run inside CUDA
graphs. A result is bit-equal from run to run; it depends on ``num_splits``, hence on the row bucket.
Legend: T tokens, B rows, N query heads, G KV heads, Q = N / G, H head dim, C >= N * H columns of ``q``, P pages.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import triton

from loraplex_kernels.gpu.attention_kernels import combine_kernel, decode_kernel, prefill_kernel
from loraplex_kernels.gpu.tuning import exact
from loraplex_kernels.kv import KvLayout

_LOG2_E = math.log2(math.e)
_MAX_SPLITS = 64
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


_DECODE_BLOCKS = AttentionBlocks(keys=64, num_warps=4, num_stages=3)
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
    """Parts of rows whose context is split. Launches that follow each other on a stream may share one."""

    partial: torch.Tensor
    """(B, N, splits, H) fp32."""
    lse: torch.Tensor
    """(B, N, splits) fp32: log2-sum-exp2 of a split's scores, -inf for an empty one."""


def decode_splits(bucket_rows: int, num_kv_heads: int, num_sms: int) -> int:
    """Into how many parts each row's context is cut: a power of two that gives every SM about two programs.

    A function of the row bucket alone, so that the graph of a bucket serves any context lengths.
    """
    wanted = max(1, min(_MAX_SPLITS, 2 * num_sms // (bucket_rows * num_kv_heads)))
    return 1 << (wanted.bit_length() - 1)


def decode_scratch(
    num_rows: int, num_heads: int, head_dim: int, num_splits: int, device: torch.device
) -> DecodeScratch | None:
    """None for one split, which needs none."""
    if num_splits == 1:
        return None
    shape = (num_rows, num_heads, num_splits)
    return DecodeScratch(
        partial=torch.empty((*shape, head_dim), dtype=torch.float32, device=device),
        lse=torch.empty(shape, dtype=torch.float32, device=device),
    )


def decode_attention(
    q: torch.Tensor,
    row_token: torch.Tensor | None,
    row_slot: torch.Tensor,
    context_len: torch.Tensor,
    page_table: torch.Tensor,
    arena: torch.Tensor,
    layout: KvLayout,
    layer: int,
    out: torch.Tensor,
    scratch: DecodeScratch | None,
    *,
    num_splits: int,
    scale: float,
    sliding_window: int | None = None,
    blocks: AttentionBlocks | None = None,
) -> None:
    """Rows of one query token, each at the last position of its context.

    ``q``: (T, C), the fused qkv buffer: its first N * H columns are the rotated queries. ``row_token``: (B,) int32,
    token of each row, -1 writes nothing; None: token b is row b. ``row_slot``, ``context_len``: (B,) int32; a row of
    context 0 (padding) gets zeros. ``page_table``: (slots, pages) int32. ``arena``: flat, pages of ``layout``, in the
    dtype of ``q``. ``out``: (T, N * H). ``scratch``: of ``decode_scratch`` for at least these rows and exactly
    ``num_splits`` (a power of two). ``sliding_window``: keys that a query sees, itself included; None: all.
    """
    num_rows, num_heads = row_slot.shape[0], _check(q, page_table, arena, layout, out, scale, sliding_window)
    if blocks is None:
        blocks = decode_blocks(layout, q.dtype)
    assert context_len.shape == (num_rows,), "one context length a row"
    assert num_splits == 1 << (num_splits.bit_length() - 1), "splits are a power of two"
    assert (scratch is None) == (num_splits == 1), "scratch is for several splits"
    assert scratch is None or scratch.lse.numel() >= num_rows * num_heads * num_splits, "the scratch is too small"
    if num_rows == 0:
        return
    group = num_heads // layout.num_kv_heads
    decode_kernel[(layout.num_kv_heads, num_splits, num_rows)](
        q,
        q.stride(0),
        row_token,
        row_slot,
        context_len,
        page_table,
        page_table.stride(0),
        arena,
        layer,
        out,
        out.stride(0),
        None if scratch is None else scratch.partial,
        None if scratch is None else scratch.lse,
        scale * _LOG2_E,
        GROUP=group,
        WINDOW=sliding_window or 0,
        NUM_SPLITS=num_splits,
        NUM_LAYERS=layout.num_layers,
        NUM_KV_HEADS=layout.num_kv_heads,
        PAGE_SIZE=layout.page_size,
        HEAD_DIM=layout.head_dim,
        BLOCK_GROUP=max(_MIN_DOT_ROWS, triton.next_power_of_2(group)),
        BLOCK_KEYS=blocks.keys,
        NUM_STAGES=blocks.num_stages,
        EXACT=exact(q.dtype),
        num_warps=blocks.num_warps,
    )
    if scratch is not None:
        combine_kernel[(num_heads, num_rows)](
            scratch.partial,
            scratch.lse,
            row_token,
            out,
            out.stride(0),
            NUM_SPLITS=num_splits,
            HEAD_DIM=layout.head_dim,
            num_warps=4,
        )


def prefill_block_tokens(layout: KvLayout, num_heads: int, dtype: torch.dtype) -> int:
    """Tokens of a prefill tile: what ``build_prefill_tiles`` cuts into and ``prefill_attention`` takes."""
    return prefill_blocks(layout, dtype).rows // (num_heads // layout.num_kv_heads)


def build_prefill_tiles(
    starts: Sequence[int] | npt.NDArray[np.integer],
    num_tokens: Sequence[int] | npt.NDArray[np.integer],
    first_tokens: Sequence[int] | npt.NDArray[np.integer],
    slots: Sequence[int] | npt.NDArray[np.integer],
    block_tokens: int,
) -> npt.NDArray[np.int32]:
    """Cuts each row's tokens into tiles: (tiles, 4) int32 of first token in the step, tokens, position, slot.

    ``starts``: position of each row's first token; ``first_tokens``: that token's index in the step. The tiles that
    see most keys come first, so that none of them starts when the others are done. For (0,), (40,), (8,), (3,) and
    32 tokens: [[40, 8, 32, 3], [8, 32, 0, 3]].
    """
    counts_R = np.asarray(num_tokens, dtype=np.int64)
    tiles_R = -(-counts_R // block_tokens)
    row_X = np.repeat(np.arange(len(counts_R)), tiles_R)
    skipped_X = (np.arange(len(row_X)) - np.repeat(np.cumsum(tiles_R) - tiles_R, tiles_R)) * block_tokens
    tiles = np.empty((len(row_X), 4), dtype=np.int32)
    tiles[:, 0] = np.asarray(first_tokens, dtype=np.int64)[row_X] + skipped_X
    tiles[:, 1] = np.minimum(counts_R[row_X] - skipped_X, block_tokens)
    tiles[:, 2] = np.asarray(starts, dtype=np.int64)[row_X] + skipped_X
    tiles[:, 3] = np.asarray(slots, dtype=np.int64)[row_X]
    return tiles[np.argsort(-(tiles[:, 2] + tiles[:, 1]), kind="stable")]


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
    num_heads = _check(q, page_table, arena, layout, out, scale, sliding_window)
    group = num_heads // layout.num_kv_heads
    if blocks is None:
        blocks = prefill_blocks(layout, q.dtype)
    assert block_tokens * group <= blocks.rows, "a tile has more queries than the block has rows"
    assert tiles.shape[1:] == (4,), "a tile has four fields"
    assert tiles.is_contiguous(), "tiles are dense"
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
    sliding_window: int | None,
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
    assert sliding_window is None or sliding_window > 0, "a token sees itself"
    return num_heads
