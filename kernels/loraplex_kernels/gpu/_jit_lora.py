"""The kernels of ``lora``: shrink, and the expand that stands alone.

Shrink, one program = one tile x one split of the input features x one module (in tiles of more than 16 rows all modules
of the site, so that x is read once): ``partial[split, token, module * RANK_CAP + j] = sum_k x[token, k] A[j, k]``.
Expand, one program = one tile x one block of columns of one module: ``out += (sum over splits of partial) B``.
Legend as in ``_jit``; K input features of a block.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from loraplex_kernels.gpu._jit import dot, expand, load_block


@triton.jit
def _load_a(a_ptr, rank_R, rank, k_K, present_K, K: tl.constexpr, WHOLE: tl.constexpr, EVICT: tl.constexpr):
    """(R, K) of A, (rank, K) row-major."""
    present_RK = (rank_R < rank)[:, None]
    if not WHOLE:
        present_RK = present_RK & present_K[None, :]
    return tl.load(a_ptr + rank_R[:, None] * K + k_K[None, :], mask=present_RK, other=0.0, eviction_policy=EVICT)


@triton.jit
def _shrink_row(
    x_ptr, partial_ptr, a_ptr, rank_R, rank, first_k,
    K: tl.constexpr, PART: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """One token: a matrix-vector product, elementwise over (R, K) and reduced once."""
    BLOCKS: tl.constexpr = (PART + BLOCK_K - 1) // BLOCK_K
    in_part_K = tl.arange(0, BLOCK_K)
    acc_RK = tl.zeros([rank_R.shape[0], BLOCK_K], tl.float32)
    for block in tl.static_range(BLOCKS):
        k_K = first_k + block * BLOCK_K + in_part_K
        present_K = (block * BLOCK_K + in_part_K < PART) & (k_K < K)
        a_RK = _load_a(a_ptr, rank_R, rank, k_K, present_K, K, WHOLE, EVICT)
        if WHOLE:
            x_K = tl.load(x_ptr + k_K)
        else:
            x_K = tl.load(x_ptr + k_K, mask=present_K, other=0.0)
        acc_RK += a_RK.to(tl.float32) * x_K.to(tl.float32)[None, :]
    tl.store(partial_ptr + rank_R, tl.sum(acc_RK, 1), mask=rank_R < rank)


@triton.jit
def _shrink_tile(
    x_ptr, partial_ptr, a_ptr, rank_R, rank, count, first_k,
    K: tl.constexpr, PART: tl.constexpr, BLOCK_K: tl.constexpr, TOKEN_STRIDE: tl.constexpr, M: tl.constexpr,
    STAGES: tl.constexpr, WHOLE: tl.constexpr, EVICT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A tile and one module."""
    BLOCKS: tl.constexpr = (PART + BLOCK_K - 1) // BLOCK_K
    token_M = tl.arange(0, M)
    present_M = token_M < count
    in_part_K = tl.arange(0, BLOCK_K)
    acc_MR = tl.zeros([M, rank_R.shape[0]], tl.float32)
    for block in tl.range(0, BLOCKS, num_stages=STAGES):
        k_K = first_k + block * BLOCK_K + in_part_K
        present_K = (block * BLOCK_K + in_part_K < PART) & (k_K < K)
        a_RK = _load_a(a_ptr, rank_R, rank, k_K, present_K, K, WHOLE, EVICT)
        x_MK = _load_x(x_ptr, token_M, present_M, k_K, present_K, K, WHOLE)
        acc_MR = dot(x_MK, tl.trans(a_RK), acc_MR, EXACT)
    _store_partial(partial_ptr, acc_MR, token_M, present_M, rank_R, rank, TOKEN_STRIDE)


@triton.jit
def _shrink_ranks(
    x_ptr, partial_ptr, a_ptr, rank_R, rank, count, first_k,
    K: tl.constexpr, PART: tl.constexpr, BLOCK_K: tl.constexpr, DOT_BLOCK_K: tl.constexpr, WHOLE: tl.constexpr,
    DOT_WHOLE: tl.constexpr, TOKEN_STRIDE: tl.constexpr, M: tl.constexpr, STAGES: tl.constexpr,
    INVARIANT: tl.constexpr, EVICT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    if (count == 1) & (not INVARIANT):
        _shrink_row(x_ptr, partial_ptr, a_ptr, rank_R, rank, first_k, K, PART, BLOCK_K, WHOLE, EVICT)
    else:
        _shrink_tile(
            x_ptr, partial_ptr, a_ptr, rank_R, rank, count, first_k,
            K, PART, DOT_BLOCK_K, TOKEN_STRIDE, M, STAGES, DOT_WHOLE, EVICT, EXACT,
        )  # fmt: skip


@triton.jit
def _load_x(x_ptr, token_M, present_M, k_K, present_K, K: tl.constexpr, WHOLE: tl.constexpr):
    present_MK = present_M[:, None]
    if not WHOLE:
        present_MK = present_MK & present_K[None, :]
    return tl.load(x_ptr + token_M[:, None] * K + k_K[None, :], mask=present_MK, other=0.0)


@triton.jit
def _store_partial(partial_ptr, acc_MR, token_M, present_M, rank_R, rank, TOKEN_STRIDE: tl.constexpr):
    tl.store(
        partial_ptr + token_M[:, None] * TOKEN_STRIDE + rank_R[None, :],
        acc_MR,
        mask=present_M[:, None] & (rank_R < rank)[None, :],
    )


@triton.jit
def _shrink_site(
    x_ptr, partial_ptr, arena_ptr, entries_ptr, record, entry, count, first_k,
    K: tl.constexpr, PART: tl.constexpr, BLOCK_K: tl.constexpr, TOKEN_STRIDE: tl.constexpr, MODULES: tl.constexpr,
    RECORD_ENTRIES: tl.constexpr, RANK_CAP: tl.constexpr, M: tl.constexpr, STAGES: tl.constexpr, WHOLE: tl.constexpr,
    EVICT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A tile and all modules of the site: one read of x, up to three products."""
    BLOCKS: tl.constexpr = (PART + BLOCK_K - 1) // BLOCK_K
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
    for block in tl.range(0, BLOCKS, num_stages=STAGES):
        k_K = first_k + block * BLOCK_K + in_part_K
        present_K = (block * BLOCK_K + in_part_K < PART) & (k_K < K)
        x_MK = _load_x(x_ptr, token_M, present_M, k_K, present_K, K, WHOLE)
        a0_RK = _load_a(a0_ptr, rank_R, rank0, k_K, present_K, K, WHOLE, EVICT)
        acc0_MR = dot(x_MK, tl.trans(a0_RK), acc0_MR, EXACT)
        if MODULES > 1:
            a1_RK = _load_a(a1_ptr, rank_R, rank1, k_K, present_K, K, WHOLE, EVICT)
            acc1_MR = dot(x_MK, tl.trans(a1_RK), acc1_MR, EXACT)
        if MODULES > 2:
            a2_RK = _load_a(a2_ptr, rank_R, rank2, k_K, present_K, K, WHOLE, EVICT)
            acc2_MR = dot(x_MK, tl.trans(a2_RK), acc2_MR, EXACT)
    _store_partial(partial_ptr, acc0_MR, token_M, present_M, rank_R, rank0, TOKEN_STRIDE)
    if MODULES > 1:
        _store_partial(partial_ptr + RANK_CAP, acc1_MR, token_M, present_M, rank_R, rank1, TOKEN_STRIDE)
    if MODULES > 2:
        _store_partial(partial_ptr + 2 * RANK_CAP, acc2_MR, token_M, present_M, rank_R, rank2, TOKEN_STRIDE)


@triton.jit(do_not_specialize=["entry", "plane", "num_tokens"])
def lora_shrink_kernel(
    x_ptr, partial_ptr, arena_ptr, entries_ptr, record_ptr, row_ptr, count_ptr, planes_ptr, entry, plane, num_tokens,
    K: tl.constexpr, PART: tl.constexpr, SPLITS: tl.constexpr, MODULES: tl.constexpr, RECORD_ENTRIES: tl.constexpr,
    RANK_CAP: tl.constexpr, RANK_BLOCK: tl.constexpr, M: tl.constexpr, BLOCK_K: tl.constexpr,
    DOT_BLOCK_K: tl.constexpr, STAGES: tl.constexpr, INVARIANT: tl.constexpr, EVICT: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Grid: (splits x modules, tiles), or (splits, tiles) where a program takes the whole site."""
    TOKEN_STRIDE: tl.constexpr = MODULES * RANK_CAP
    WHOLE: tl.constexpr = (PART * SPLITS == K) and (PART % BLOCK_K == 0)
    DOT_WHOLE: tl.constexpr = (PART * SPLITS == K) and (PART % DOT_BLOCK_K == 0)
    split = tl.program_id(0) % SPLITS
    module = tl.program_id(0) // SPLITS
    tile = tl.program_id(1)
    first_k = split * PART
    if (tl.load(count_ptr + tile) > 0) & (tl.load(planes_ptr + tile) > plane):
        count = tl.load(count_ptr + tile)
        row = tl.load(row_ptr + tile).to(tl.int64)
        record = tl.load(record_ptr + tile) + plane
        x_ptr += row * K
        partial_ptr += (split * num_tokens + row) * TOKEN_STRIDE
        if M > 16:
            _shrink_site(
                x_ptr, partial_ptr, arena_ptr, entries_ptr, record, entry, count, first_k,
                K, PART, DOT_BLOCK_K, TOKEN_STRIDE, MODULES, RECORD_ENTRIES, RANK_CAP, M, STAGES, DOT_WHOLE, EVICT,
                EXACT,
            )  # fmt: skip
        else:
            a_ptr, rank = load_block(arena_ptr, entries_ptr, record, entry + 2 * module, RECORD_ENTRIES)
            partial_ptr += module * RANK_CAP
            rank_R = tl.arange(0, RANK_BLOCK)
            if RANK_CAP <= RANK_BLOCK:
                if rank > 0:
                    _shrink_ranks(
                        x_ptr, partial_ptr, a_ptr, rank_R, rank, count, first_k,
                        K, PART, BLOCK_K, DOT_BLOCK_K, WHOLE, DOT_WHOLE, TOKEN_STRIDE, M, STAGES, INVARIANT, EVICT,
                        EXACT,
                    )  # fmt: skip
            else:
                for start in tl.range(0, rank, RANK_BLOCK):
                    _shrink_ranks(
                        x_ptr, partial_ptr, a_ptr, start + rank_R, rank, count, first_k,
                        K, PART, BLOCK_K, DOT_BLOCK_K, WHOLE, DOT_WHOLE, TOKEN_STRIDE, M, STAGES, INVARIANT, EVICT,
                        EXACT,
                    )  # fmt: skip


@triton.jit
def _expand_into(
    out_ptr, partial_ptr, b_ptr, rank, width, column_N, first_column, count, split_stride,
    OUT_STRIDE: tl.constexpr, TOKEN_STRIDE: tl.constexpr, SPLITS: tl.constexpr, RANK_CAP: tl.constexpr,
    RANK_BLOCK: tl.constexpr, M: tl.constexpr, EVICT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    token_M = tl.arange(0, M)
    present_N = column_N < width
    present_MN = (token_M < count)[:, None] & present_N[None, :]
    out_ptrs = out_ptr + token_M[:, None] * OUT_STRIDE + (first_column + column_N)[None, :]
    out_MN = tl.load(out_ptrs, mask=present_MN, other=0.0)
    delta_MN = expand(
        partial_ptr, b_ptr, rank, width, column_N, present_N, count, split_stride,
        TOKEN_STRIDE, SPLITS, RANK_CAP, RANK_BLOCK, M, EVICT, EXACT,
    )  # fmt: skip
    tl.store(out_ptrs, (out_MN.to(tl.float32) + delta_MN).to(out_MN.dtype), mask=present_MN)


@triton.jit(do_not_specialize=["entry", "plane", "num_tokens"])
def lora_expand_kernel(
    out_ptr, partial_ptr, arena_ptr, entries_ptr, record_ptr, row_ptr, count_ptr, planes_ptr, entry, plane, num_tokens,
    WIDTH_0: tl.constexpr, WIDTH_1: tl.constexpr, WIDTH_2: tl.constexpr, SPLITS: tl.constexpr, MODULES: tl.constexpr,
    RECORD_ENTRIES: tl.constexpr, RANK_CAP: tl.constexpr, RANK_BLOCK: tl.constexpr, M: tl.constexpr,
    BLOCK_N: tl.constexpr, INVARIANT: tl.constexpr, EVICT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of all modules' columns, tiles). ``entry``: B of the site's first module."""
    OUT_STRIDE: tl.constexpr = WIDTH_0 + WIDTH_1 + WIDTH_2
    TOKEN_STRIDE: tl.constexpr = MODULES * RANK_CAP
    BLOCKS_0: tl.constexpr = (WIDTH_0 + BLOCK_N - 1) // BLOCK_N
    BLOCKS_1: tl.constexpr = (WIDTH_1 + BLOCK_N - 1) // BLOCK_N
    block = tl.program_id(0)
    tile = tl.program_id(1)
    module = (block >= BLOCKS_0).to(tl.int32) + (block >= BLOCKS_0 + BLOCKS_1).to(tl.int32)
    width = tl.where(module == 0, WIDTH_0, tl.where(module == 1, WIDTH_1, WIDTH_2))
    first_column = tl.where(module == 0, 0, tl.where(module == 1, WIDTH_0, WIDTH_0 + WIDTH_1))
    first_block = tl.where(module == 0, 0, tl.where(module == 1, BLOCKS_0, BLOCKS_0 + BLOCKS_1))
    column_N = (block - first_block) * BLOCK_N + tl.arange(0, BLOCK_N)
    if (tl.load(count_ptr + tile) > 0) & (tl.load(planes_ptr + tile) > plane):
        count = tl.load(count_ptr + tile)
        row = tl.load(row_ptr + tile).to(tl.int64)
        record = tl.load(record_ptr + tile) + plane
        b_ptr, rank = load_block(arena_ptr, entries_ptr, record, entry + 2 * module, RECORD_ENTRIES)
        out_ptr += row * OUT_STRIDE
        partial_ptr += row * TOKEN_STRIDE + module * RANK_CAP
        split_stride = num_tokens * TOKEN_STRIDE
        if rank > 0:
            if (count == 1) & (not INVARIANT):
                _expand_into(
                    out_ptr, partial_ptr, b_ptr, rank, width, column_N, first_column, count, split_stride,
                    OUT_STRIDE, TOKEN_STRIDE, SPLITS, RANK_CAP, RANK_BLOCK, 1, EVICT, EXACT,
                )  # fmt: skip
            else:
                _expand_into(
                    out_ptr, partial_ptr, b_ptr, rank, width, column_N, first_column, count, split_stride,
                    OUT_STRIDE, TOKEN_STRIDE, SPLITS, RANK_CAP, RANK_BLOCK, M, EVICT, EXACT,
                )  # fmt: skip
