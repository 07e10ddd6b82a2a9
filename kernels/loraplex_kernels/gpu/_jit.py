"""Device functions that the LoRA kernels share: decoding an entry, and the expand of a block of output columns.

Legend: M tokens of a tile (1: matrix-vector products instead of dots), N columns of a block, R ranks of a block.
EXACT computes dots in fp32 whatever the inputs are: for fp32 models, and because Triton's interpreter has no bf16
arithmetic. OVERLAP: the GPU can start a kernel before its predecessor ends (programmatic dependent launch); then
``wait`` separates what is constant during a step, adapters and tiles, from what kernels before this one write.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """Until all that precedes on the stream is complete and visible."""
    if OVERLAP:
        gdc_wait()


@triton.jit
def let_next_start(OVERLAP: tl.constexpr):
    """The next kernel may be launched as soon as every program of this one has come here."""
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def load_tile(record_ptr, row_ptr, count_ptr, tile):
    """(record, first token, tokens, whether it holds any) of a tile.

    All that these functions read is read again by each layer: it is to stay in the L2 cache while weights pass by.
    """
    record = tl.load(record_ptr + tile, eviction_policy="evict_last")
    count = tl.load(count_ptr + tile, eviction_policy="evict_last")
    row = tl.load(row_ptr + tile, eviction_policy="evict_last").to(tl.int64)
    # Every record is at least -1. To ask for it keeps the compiler from loading it after the branch only, one trip to
    # memory later.
    return record, row, count, (count > 0) & (record >= -1)


@triton.jit
def load_block(arena_ptr, entries_ptr, record, entry, RECORD_ENTRIES: tl.constexpr):
    """(pointer to the block's first element, its rank) of ``entry`` (index into a record); rank 0 without a record."""
    entry_ptr = entries_ptr + tl.maximum(record, 0).to(tl.int64) * RECORD_ENTRIES + entry
    packed = tl.load(entry_ptr, eviction_policy="evict_last")
    rank = tl.where(record >= 0, (packed & 255).to(tl.int32) * 8, 0)
    return arena_ptr + (packed >> 8) * 8, rank


@triton.jit
def dot(a, b, acc, EXACT: tl.constexpr):
    if EXACT:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def load_b(b_ptr, rank_R, rank, width, column_N, present_N, EVICT: tl.constexpr):
    """(R, N) of B, (rank, width) row-major."""
    return tl.load(
        b_ptr + rank_R[:, None] * width + column_N[None, :],
        mask=(rank_R < rank)[:, None] & present_N[None, :],
        other=0.0,
        eviction_policy=EVICT,
    )


@triton.jit
def load_shrunk(
    partial_ptr, rank_R, rank, count, split_stride, TOKEN_STRIDE: tl.constexpr, SPLITS: tl.constexpr, M: tl.constexpr
):
    """(M, R) fp32, (R,) where M is 1: x A^T, the splits added in order.

    ``partial_ptr``: ranks of the tile's first token and this module, split 0.
    """
    if M == 1:
        offset = rank_R
        present = rank_R < rank
    else:
        token_M = tl.arange(0, M)
        offset = token_M[:, None] * TOKEN_STRIDE + rank_R[None, :]
        present = (token_M < count)[:, None] & (rank_R < rank)[None, :]
    h = tl.load(partial_ptr + offset, mask=present, other=0.0)
    for split in tl.static_range(1, SPLITS):
        h += tl.load(partial_ptr + split * split_stride + offset, mask=present, other=0.0)
    return h


@triton.jit
def product(h, b_RN, M: tl.constexpr, EXACT: tl.constexpr):
    """(M, N) fp32: what ``load_shrunk`` gave, times ``b_RN``."""
    if M == 1:
        product_MN = tl.sum(b_RN.to(tl.float32) * h[:, None], 0)[None, :]
    else:
        product_MN = dot(h.to(b_RN.dtype), b_RN, tl.zeros([M, b_RN.shape[1]], tl.float32), EXACT)
    return product_MN


@triton.jit
def add_further_ranks(
    acc_MN, partial_ptr, b_ptr, rank, width, column_N, present_N, count, split_stride,
    TOKEN_STRIDE: tl.constexpr, SPLITS: tl.constexpr, RANK_CAP: tl.constexpr, RANK_BLOCK: tl.constexpr,
    M: tl.constexpr, EVICT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """``acc_MN``, which holds the product of the first RANK_BLOCK ranks, plus that of the others."""
    if RANK_CAP > RANK_BLOCK:
        for start in tl.range(RANK_BLOCK, rank, RANK_BLOCK):
            rank_R = start + tl.arange(0, RANK_BLOCK)
            b_RN = load_b(b_ptr, rank_R, rank, width, column_N, present_N, EVICT)
            h = load_shrunk(partial_ptr, rank_R, rank, count, split_stride, TOKEN_STRIDE, SPLITS, M)
            acc_MN += product(h, b_RN, M, EXACT)
    return acc_MN
