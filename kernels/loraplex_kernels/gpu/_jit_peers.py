"""The kernel of ``peers``: one program = one token's row. Legend: D features of a row, R ranks of a block."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from loraplex_kernels.gpu._jit import load_b, load_block, product, wait
from loraplex_kernels.gpu._jit_rows import normed


@triton.jit
def _sum_shrunk(
    shrunk_ptr, first, rank_R, rank, split_stride, WORLD: tl.constexpr, SPLITS: tl.constexpr, PARTS: tl.constexpr
):
    """(R,) fp32: x A^T, summed over the splits of all ranks. ``first``: element of the token's first rank, split 0.

    One load of all parts, of which each element is a thread's: what every warp reads for itself crosses to the other
    GPU as often."""
    part_P = tl.arange(0, PARTS)
    present_P = part_P < WORLD * SPLITS
    rank_ptr_P = tl.load(shrunk_ptr + part_P // SPLITS, mask=present_P, other=0).to(tl.pointer_type(tl.float32))
    part_ptr_P = rank_ptr_P + (first + (part_P % SPLITS) * split_stride)
    h_PR = tl.load(
        part_ptr_P[:, None] + rank_R[None, :],
        mask=present_P[:, None] & (rank_R < rank)[None, :],
        other=0.0,
        cache_modifier=".cg",
    )
    return tl.sum(h_PR, 0)


@triton.jit(do_not_specialize=["entry", "num_tokens"])
def add_peers_rms_norm_kernel(
    residual_ptr, weight_ptr, out_ptr, parts_ptr, flags_ptr, count_ptr, shrunk_ptr, arena_ptr, entries_ptr,
    token_record_ptr, entry, num_tokens, eps,
    RANK: tl.constexpr, WORLD: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BUFFERS: tl.constexpr,
    LORA: tl.constexpr, RECORD_ENTRIES: tl.constexpr, SPLITS: tl.constexpr, PARTS: tl.constexpr,
    RANK_CAP: tl.constexpr, RANK_BLOCK: tl.constexpr, EVICT: tl.constexpr, EXACT: tl.constexpr, OVERLAP: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Grid: (tokens,). Flags hold how many exchanges of the row a rank has announced, and grow until they wrap.

    LORA: the shrunk activations at ``shrunk_ptr`` are still to be expanded. B comes while the kernel before ends where
    that one does not have to (EARLY), otherwise while the ranks wait for each other: the announcement waits for what
    was loaded before it.
    """
    token = tl.program_id(0).to(tl.int64)
    row = token * D
    column_D = tl.arange(0, BLOCK_D)
    present_D = column_D < D
    weight_D = tl.load(weight_ptr + column_D, mask=present_D, other=0.0)
    if LORA:
        record = tl.load(token_record_ptr + token)
        b_ptr, rank = load_block(arena_ptr, entries_ptr, record, entry, RECORD_ENTRIES)
        rank_R = tl.arange(0, RANK_BLOCK)
        if EARLY:
            b_RD = load_b(b_ptr, rank_R, rank, D, column_D, present_D, EVICT)
    wait(OVERLAP)
    residual_D = tl.load(residual_ptr + row + column_D, mask=present_D, other=0.0)
    count = tl.load(count_ptr + token) + 1
    # This rank's part was written by an earlier kernel of the stream: whoever sees the flag sees the part.
    for peer in tl.static_range(WORLD):
        if peer != RANK:
            flag_ptr = tl.load(flags_ptr + peer).to(tl.pointer_type(tl.int32)) + token * WORLD + RANK
            tl.atomic_xchg(flag_ptr, count, sem="release", scope="sys")
    if LORA and not EARLY:
        b_RD = load_b(b_ptr, rank_R, rank, D, column_D, present_D, EVICT)
    own_ptr = tl.load(flags_ptr + RANK).to(tl.pointer_type(tl.int32)) + token * WORLD
    for peer in tl.static_range(WORLD):
        if peer != RANK:
            # A peer may be one exchange ahead already.
            while tl.atomic_add(own_ptr + peer, 0, sem="acquire", scope="sys") - count < 0:
                pass
    x_D = residual_D.to(tl.float32)
    for part in tl.static_range(WORLD * BUFFERS):
        part_ptr = tl.load(parts_ptr + part).to(tl.pointer_type(residual_ptr.dtype.element_ty))
        part_ptr = tl.multiple_of(part_ptr, 16)
        x_D += tl.load(part_ptr + row + column_D, mask=present_D, other=0.0, cache_modifier=".cg").to(tl.float32)
    if LORA:
        first = token * RANK_CAP
        split_stride = num_tokens * RANK_CAP
        h_R = _sum_shrunk(shrunk_ptr, first, rank_R, rank, split_stride, WORLD, SPLITS, PARTS)
        lora_1D = product(h_R, b_RD, 1, EXACT)
        if RANK_CAP > RANK_BLOCK:
            for start in tl.range(RANK_BLOCK, rank, RANK_BLOCK):
                further_R = start + rank_R
                b_RD = load_b(b_ptr, further_R, rank, D, column_D, present_D, EVICT)
                h_R = _sum_shrunk(shrunk_ptr, first, further_R, rank, split_stride, WORLD, SPLITS, PARTS)
                lora_1D += product(h_R, b_RD, 1, EXACT)
        x_D += tl.sum(lora_1D, 0)
    tl.store(count_ptr + token, count)
    sum_D = x_D.to(residual_D.dtype)
    tl.store(residual_ptr + row + column_D, sum_D, mask=present_D)
    normed_D = normed(sum_D.to(tl.float32), weight_D.to(tl.float32), eps, D)
    tl.store(out_ptr + row + column_D, normed_D.to(sum_D.dtype), mask=present_D)
