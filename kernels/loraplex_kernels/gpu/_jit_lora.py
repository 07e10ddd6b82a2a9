"""The kernels of ``lora``: shrink, and the expand that stands alone.

Shrink, one program = one tile x one split of the input features x one module (in tiles of more than 16 rows all modules
of the site, so that x is read once): ``partial[split, token, module * RANK_CAP + j] = sum_k x[token, k] A[j, k]``.
Expand, one program = one tile x some blocks of columns of one module: ``out += (sum over splits of partial) B``.
Legend as in ``_jit``; K input features of a block, W parts of it that warps multiply side by side.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from loraplex_kernels.gpu._jit import (
    add_further_ranks,
    dot,
    let_next_start,
    load_b,
    load_block,
    load_shrunk,
    load_tile,
    product,
    wait,
)


@triton.jit
def _shrink_row(
    x_ptr, partial_ptr, a_ptr, rank_R, rank, first_k,
    K: tl.constexpr, PART: tl.constexpr, BLOCK_K: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """One token and the whole split at once: a matrix-vector product."""
    in_part_K = tl.arange(0, BLOCK_K)
    k_K = first_k + in_part_K
    present_K = (in_part_K < PART) & (k_K < K)
    a_RK = tl.load(
        a_ptr + rank_R[:, None] * K + k_K[None, :],
        mask=(rank_R < rank)[:, None] & present_K[None, :],
        other=0.0,
        eviction_policy=EVICT,
    )
    # x comes behind a barrier, or the compiler would put off most loads of A until those before them have been used.
    tl.debug_barrier()
    x_K = tl.load(x_ptr + k_K, mask=present_K, other=0.0)
    h_R = tl.sum(a_RK.to(tl.float32) * x_K.to(tl.float32)[None, :], 1)
    tl.store(partial_ptr + rank_R, h_R, mask=rank_R < rank)


@triton.jit
def _shrink_tile(
    x_ptr, partial_ptr, a_ptr, rank, count, first_k,
    K: tl.constexpr, PART: tl.constexpr, BLOCK_K: tl.constexpr, TOKEN_STRIDE: tl.constexpr, RANK_CAP: tl.constexpr,
    M: tl.constexpr, W: tl.constexpr, STAGES: tl.constexpr, EVICT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A tile and one module. A dot of few rows would keep one warp busy: W warps each take a part of the features."""
    token_M = tl.arange(0, M)[None, :, None]
    rank_R = tl.arange(0, RANK_CAP)[None, :, None]
    in_block_K = tl.arange(0, W)[:, None, None] * (BLOCK_K // W) + tl.arange(0, BLOCK_K // W)[None, None, :]
    acc_WMR = tl.zeros([W, M, RANK_CAP], tl.float32)
    for start in tl.range(0, PART, BLOCK_K, num_stages=STAGES):
        k_K = first_k + start + in_block_K
        present_K = (start + in_block_K < PART) & (k_K < K)
        a_WRK = tl.load(a_ptr + rank_R * K + k_K, mask=(rank_R < rank) & present_K, other=0.0, eviction_policy=EVICT)
        x_WMK = tl.load(x_ptr + token_M * K + k_K, mask=(token_M < count) & present_K, other=0.0)
        acc_WMR = dot(x_WMK, tl.permute(a_WRK, (0, 2, 1)), acc_WMR, EXACT)
    _store_partial(partial_ptr, tl.sum(acc_WMR, 0), count, rank, TOKEN_STRIDE, M, RANK_CAP)


@triton.jit
def _load_a(a_ptr, rank_R, rank, k_K, present_K, K: tl.constexpr, EVICT: tl.constexpr):
    """(R, K) of A, (rank, K) row-major."""
    present_RK = (rank_R < rank)[:, None] & present_K[None, :]
    return tl.load(a_ptr + rank_R[:, None] * K + k_K[None, :], mask=present_RK, other=0.0, eviction_policy=EVICT)


@triton.jit
def _store_partial(
    partial_ptr, acc_MR, count, rank, TOKEN_STRIDE: tl.constexpr, M: tl.constexpr, RANK_CAP: tl.constexpr
):
    token_M = tl.arange(0, M)
    rank_R = tl.arange(0, RANK_CAP)
    tl.store(
        partial_ptr + token_M[:, None] * TOKEN_STRIDE + rank_R[None, :],
        acc_MR,
        mask=(token_M < count)[:, None] & (rank_R < rank)[None, :],
    )


@triton.jit
def _shrink_site(
    x_ptr, partial_ptr, arena_ptr, entries_ptr, record, entry, count, first_k,
    K: tl.constexpr, PART: tl.constexpr, BLOCK_K: tl.constexpr, TOKEN_STRIDE: tl.constexpr, MODULES: tl.constexpr,
    RECORD_ENTRIES: tl.constexpr, RANK_CAP: tl.constexpr, M: tl.constexpr, STAGES: tl.constexpr,
    EVICT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A tile and all modules of the site: one read of x, up to three products."""
    a0_ptr, rank0 = load_block(arena_ptr, entries_ptr, record, entry, RECORD_ENTRIES)
    a1_ptr, rank1 = a0_ptr, rank0
    a2_ptr, rank2 = a0_ptr, rank0
    if MODULES > 1:
        a1_ptr, rank1 = load_block(arena_ptr, entries_ptr, record, entry + 2, RECORD_ENTRIES)
    if MODULES > 2:
        a2_ptr, rank2 = load_block(arena_ptr, entries_ptr, record, entry + 4, RECORD_ENTRIES)
    token_M = tl.arange(0, M)
    present_M = token_M < count
    rank_R = tl.arange(0, RANK_CAP)
    in_part_K = tl.arange(0, BLOCK_K)
    acc0_MR = tl.zeros([M, RANK_CAP], tl.float32)
    acc1_MR = tl.zeros([M, RANK_CAP], tl.float32)
    acc2_MR = tl.zeros([M, RANK_CAP], tl.float32)
    for start in tl.range(0, PART, BLOCK_K, num_stages=STAGES):
        k_K = first_k + start + in_part_K
        present_K = (start + in_part_K < PART) & (k_K < K)
        x_MK = tl.load(
            x_ptr + token_M[:, None] * K + k_K[None, :], mask=present_M[:, None] & present_K[None, :], other=0.0
        )
        a0_RK = _load_a(a0_ptr, rank_R, rank0, k_K, present_K, K, EVICT)
        acc0_MR = dot(x_MK, tl.trans(a0_RK), acc0_MR, EXACT)
        if MODULES > 1:
            a1_RK = _load_a(a1_ptr, rank_R, rank1, k_K, present_K, K, EVICT)
            acc1_MR = dot(x_MK, tl.trans(a1_RK), acc1_MR, EXACT)
        if MODULES > 2:
            a2_RK = _load_a(a2_ptr, rank_R, rank2, k_K, present_K, K, EVICT)
            acc2_MR = dot(x_MK, tl.trans(a2_RK), acc2_MR, EXACT)
    _store_partial(partial_ptr, acc0_MR, count, rank0, TOKEN_STRIDE, M, RANK_CAP)
    if MODULES > 1:
        _store_partial(partial_ptr + RANK_CAP, acc1_MR, count, rank1, TOKEN_STRIDE, M, RANK_CAP)
    if MODULES > 2:
        _store_partial(partial_ptr + 2 * RANK_CAP, acc2_MR, count, rank2, TOKEN_STRIDE, M, RANK_CAP)


@triton.jit(do_not_specialize=["entry", "plane", "num_tokens"])
def lora_shrink_kernel(
    x_ptr, partial_ptr, arena_ptr, entries_ptr, record_ptr, row_ptr, count_ptr, planes_ptr, entry, plane, num_tokens,
    K: tl.constexpr, PART: tl.constexpr, SPLITS: tl.constexpr, MODULES: tl.constexpr, RECORD_ENTRIES: tl.constexpr,
    RANK_CAP: tl.constexpr, RANK_BLOCK: tl.constexpr, M: tl.constexpr, BLOCK_K: tl.constexpr, W: tl.constexpr,
    STAGES: tl.constexpr, EVICT: tl.constexpr, EXACT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid: (splits x modules, tiles), or (splits, tiles) where a program takes the whole site.

    Reads nothing that its predecessor on the stream writes, yet ends after it: then what waits for this kernel alone
    has waited for both.
    """
    let_next_start(OVERLAP)
    TOKEN_STRIDE: tl.constexpr = MODULES * RANK_CAP
    split = tl.program_id(0) % SPLITS
    module = tl.program_id(0) // SPLITS
    tile = tl.program_id(1)
    first_k = split * PART
    record, row, count, live = load_tile(record_ptr, row_ptr, count_ptr, tile)
    if live & (tl.load(planes_ptr + tile) > plane):
        record += plane
        x_ptr += row * K
        partial_ptr += (split * num_tokens + row) * TOKEN_STRIDE
        if M > 16:
            _shrink_site(
                x_ptr, partial_ptr, arena_ptr, entries_ptr, record, entry, count, first_k,
                K, PART, BLOCK_K, TOKEN_STRIDE, MODULES, RECORD_ENTRIES, RANK_CAP, M, STAGES, EVICT, EXACT,
            )  # fmt: skip
        else:
            a_ptr, rank = load_block(arena_ptr, entries_ptr, record, entry + 2 * module, RECORD_ENTRIES)
            partial_ptr += module * RANK_CAP
            if rank > 0:
                if M == 1:
                    rank_R = tl.arange(0, RANK_BLOCK)
                    _shrink_row(x_ptr, partial_ptr, a_ptr, rank_R, rank, first_k, K, PART, BLOCK_K, EVICT)
                    if RANK_CAP > RANK_BLOCK:
                        for start in tl.range(RANK_BLOCK, rank, RANK_BLOCK):
                            _shrink_row(
                                x_ptr, partial_ptr, a_ptr, start + rank_R, rank, first_k, K, PART, BLOCK_K, EVICT
                            )
                else:
                    _shrink_tile(
                        x_ptr, partial_ptr, a_ptr, rank, count, first_k,
                        K, PART, BLOCK_K, TOKEN_STRIDE, RANK_CAP, M, W, STAGES, EVICT, EXACT,
                    )  # fmt: skip
    wait(OVERLAP)


@triton.jit
def _store_expanded(
    out_ptr, delta_MN, column_N, present_N, count, OUT_STRIDE: tl.constexpr, ADD: tl.constexpr, M: tl.constexpr
):
    token_M = tl.arange(0, M)
    present_MN = (token_M < count)[:, None] & present_N[None, :]
    out_ptrs = out_ptr + token_M[:, None] * OUT_STRIDE + column_N[None, :]
    if ADD:
        delta_MN += tl.load(out_ptrs, mask=present_MN, other=0.0).to(tl.float32)
    tl.store(out_ptrs, delta_MN.to(out_ptr.dtype.element_ty), mask=present_MN)


@triton.jit(do_not_specialize=["entry", "plane", "num_tokens"])
def lora_expand_kernel(
    out_ptr, partial_ptr, arena_ptr, entries_ptr, record_ptr, row_ptr, count_ptr, planes_ptr, entry, plane, num_tokens,
    WIDTH_0: tl.constexpr, WIDTH_1: tl.constexpr, WIDTH_2: tl.constexpr, SPLITS: tl.constexpr, MODULES: tl.constexpr,
    RECORD_ENTRIES: tl.constexpr, RANK_CAP: tl.constexpr, RANK_BLOCK: tl.constexpr, M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr, ADD: tl.constexpr, EVICT: tl.constexpr,
    EXACT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid: (BLOCKS blocks each of all modules' columns, tiles). ``entry``: B of the site's first module.

    ADD: out is added to. Otherwise all rows of live tiles are written, with zeros where an adapter has nothing.
    """
    let_next_start(OVERLAP)
    OUT_STRIDE: tl.constexpr = WIDTH_0 + WIDTH_1 + WIDTH_2
    TOKEN_STRIDE: tl.constexpr = MODULES * RANK_CAP
    PROGRAM_N: tl.constexpr = BLOCK_N * BLOCKS
    PROGRAMS_0: tl.constexpr = (WIDTH_0 + PROGRAM_N - 1) // PROGRAM_N
    PROGRAMS_1: tl.constexpr = (WIDTH_1 + PROGRAM_N - 1) // PROGRAM_N
    program = tl.program_id(0)
    tile = tl.program_id(1)
    module = (program >= PROGRAMS_0).to(tl.int32) + (program >= PROGRAMS_0 + PROGRAMS_1).to(tl.int32)
    width = tl.where(module == 0, WIDTH_0, tl.where(module == 1, WIDTH_1, WIDTH_2))
    module_column = tl.where(module == 0, 0, tl.where(module == 1, WIDTH_0, WIDTH_0 + WIDTH_1))
    first_program = tl.where(module == 0, 0, tl.where(module == 1, PROGRAMS_0, PROGRAMS_0 + PROGRAMS_1))
    record, row, count, live = load_tile(record_ptr, row_ptr, count_ptr, tile)
    has_plane = tl.load(planes_ptr + tile) > plane
    record = tl.where(has_plane, record + plane, -1)
    out_ptr += row * OUT_STRIDE + module_column
    partial_ptr += row * TOKEN_STRIDE + module * RANK_CAP
    split_stride = num_tokens * TOKEN_STRIDE
    if live:
        b_ptr, rank = load_block(arena_ptr, entries_ptr, record, entry + 2 * module, RECORD_ENTRIES)
        rank_R = tl.arange(0, RANK_BLOCK)
        column_N = (program - first_program) * PROGRAM_N + tl.arange(0, BLOCK_N)
        if not ADD or rank > 0:
            if BLOCKS == 1:
                present_N = column_N < width
                b_RN = load_b(b_ptr, rank_R, rank, width, column_N, present_N, EVICT)
                wait(OVERLAP)
                h = load_shrunk(partial_ptr, rank_R, rank, count, split_stride, TOKEN_STRIDE, SPLITS, M)
                delta_MN = add_further_ranks(
                    product(h, b_RN, M, EXACT), partial_ptr, b_ptr, rank, width, column_N, present_N, count,
                    split_stride, TOKEN_STRIDE, SPLITS, RANK_CAP, RANK_BLOCK, M, EVICT, EXACT,
                )  # fmt: skip
                _store_expanded(out_ptr, delta_MN, column_N, present_N, count, OUT_STRIDE, ADD, M)
            else:
                wait(OVERLAP)
                h = load_shrunk(partial_ptr, rank_R, rank, count, split_stride, TOKEN_STRIDE, SPLITS, M)
                for block in tl.range(0, BLOCKS, num_stages=STAGES):
                    block_N = column_N + block * BLOCK_N
                    present_N = block_N < width
                    b_RN = load_b(b_ptr, rank_R, rank, width, block_N, present_N, EVICT)
                    delta_MN = product(h, b_RN, M, EXACT)
                    _store_expanded(out_ptr, delta_MN, block_N, present_N, count, OUT_STRIDE, ADD, M)
    wait(OVERLAP)
