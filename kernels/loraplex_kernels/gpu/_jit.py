"""Device functions that the LoRA kernels share: decoding an entry, and the expand of a block of output columns.

Legend: M tokens of a tile (1: a matrix-vector product instead of a dot), N columns of a block, R ranks of a block.
EXACT computes dots in fp32 whatever the inputs are: for fp32 models, and because Triton's interpreter has no bf16
arithmetic.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl


@triton.jit
def load_block(arena_ptr, entries_ptr, record, entry, RECORD_ENTRIES: tl.constexpr):
    """(pointer to the block's first element, its rank) of ``entry`` (index into a record); rank 0 without a record."""
    packed = tl.load(entries_ptr + tl.maximum(record, 0).to(tl.int64) * RECORD_ENTRIES + entry)
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
def expand_ranks(
    acc_MN,
    partial_ptr,
    b_ptr,
    rank_R,
    rank,
    width,
    column_N,
    present_N,
    count,
    split_stride,
    TOKEN_STRIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    M: tl.constexpr,
    EVICT: tl.constexpr,
    EXACT: tl.constexpr,
):
    """``acc_MN`` plus the part of ``rank_R``."""
    present_R = rank_R < rank
    b_RN = tl.load(
        b_ptr + rank_R[:, None] * width + column_N[None, :],
        mask=present_R[:, None] & present_N[None, :],
        other=0.0,
        eviction_policy=EVICT,
    )
    if M == 1:
        h_R = tl.load(partial_ptr + rank_R, mask=present_R, other=0.0)
        for split in tl.static_range(1, SPLITS):
            h_R += tl.load(partial_ptr + split * split_stride + rank_R, mask=present_R, other=0.0)
        acc_MN += tl.sum(b_RN.to(tl.float32) * h_R[:, None], 0)[None, :]
    else:
        token_M = tl.arange(0, M)
        offset_MR = token_M[:, None] * TOKEN_STRIDE + rank_R[None, :]
        present_MR = (token_M < count)[:, None] & present_R[None, :]
        h_MR = tl.load(partial_ptr + offset_MR, mask=present_MR, other=0.0)
        for split in tl.static_range(1, SPLITS):
            h_MR += tl.load(partial_ptr + split * split_stride + offset_MR, mask=present_MR, other=0.0)
        acc_MN = dot(h_MR.to(b_RN.dtype), b_RN, acc_MN, EXACT)
    return acc_MN


@triton.jit
def expand(
    partial_ptr,
    b_ptr,
    rank,
    width,
    column_N,
    present_N,
    count,
    split_stride,
    TOKEN_STRIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    RANK_CAP: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    M: tl.constexpr,
    EVICT: tl.constexpr,
    EXACT: tl.constexpr,
):
    """(M, N) fp32: the shrunk activations of a tile of ``count`` tokens times columns ``column_N`` of one B.

    ``partial_ptr``: fp32, ranks of the tile's first token and this module, split 0; ``b_ptr``: (rank, width) row-major.
    """
    rank_R = tl.arange(0, RANK_BLOCK)
    acc_MN = tl.zeros([M, column_N.shape[0]], tl.float32)
    if RANK_CAP <= RANK_BLOCK:
        acc_MN = expand_ranks(
            acc_MN, partial_ptr, b_ptr, rank_R, rank, width, column_N, present_N, count, split_stride,
            TOKEN_STRIDE, SPLITS, M, EVICT, EXACT,
        )  # fmt: skip
    else:
        for start in tl.range(0, rank, RANK_BLOCK):
            acc_MN = expand_ranks(
                acc_MN, partial_ptr, b_ptr, start + rank_R, rank, width, column_N, present_N, count, split_stride,
                TOKEN_STRIDE, SPLITS, M, EVICT, EXACT,
            )  # fmt: skip
    return acc_MN
