"""The kernels of ``activation`` and ``norm``: one program = one token's row, or a tile x a block of columns.

Legend as in ``_jit``; D features of a row.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from loraplex_kernels.gpu._jit import (
    add_further_ranks,
    dot,
    load_b,
    load_block,
    load_shrunk,
    load_tile,
    product,
    wait,
)


@triton.jit
def _load_pair(
    gate_up_ptr, added_ptr, column_N, present_N, count, WIDTH: tl.constexpr, ADDED: tl.constexpr, M: tl.constexpr
):
    """Gate and up, (M, N) fp32 each."""
    token_M = tl.arange(0, M)
    present_MN = (token_M < count)[:, None] & present_N[None, :]
    gate_MN = token_M[:, None] * (2 * WIDTH) + column_N[None, :]
    gate = tl.load(gate_up_ptr + gate_MN, mask=present_MN, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + gate_MN + WIDTH, mask=present_MN, other=0.0).to(tl.float32)
    if ADDED:
        gate += tl.load(added_ptr + gate_MN, mask=present_MN, other=0.0).to(tl.float32)
        up += tl.load(added_ptr + gate_MN + WIDTH, mask=present_MN, other=0.0).to(tl.float32)
    return gate, up


@triton.jit
def _sigmoid(x):
    """In half the instructions of ``tl.sigmoid``, whose exponential and quotient take care of subnormal numbers."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return root * root


@triton.jit
def _store_gated(out_ptr, gate_MN, up_MN, column_N, present_N, count, WIDTH: tl.constexpr, M: tl.constexpr):
    """Returns what it stores, 0 where it does not."""
    token_M = tl.arange(0, M)
    gated_MN = (gate_MN * _sigmoid(gate_MN) * up_MN).to(out_ptr.dtype.element_ty)
    tl.store(
        out_ptr + token_M[:, None] * WIDTH + column_N[None, :],
        gated_MN,
        mask=(token_M < count)[:, None] & present_N[None, :],
    )
    return gated_MN


@triton.jit(do_not_specialize=["num_tokens"])
def silu_mul_kernel(
    gate_up_ptr, added_ptr, out_ptr, num_tokens,
    WIDTH: tl.constexpr, ADDED: tl.constexpr, M: tl.constexpr, BLOCK_N: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of columns, M tokens each). ADDED: ``added_ptr`` holds the LoRA of gate and up."""
    wait(OVERLAP)
    row = tl.program_id(1).to(tl.int64) * M
    count = num_tokens - row
    column_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    present_N = column_N < WIDTH
    first = row * (2 * WIDTH)
    gate_MN, up_MN = _load_pair(gate_up_ptr + first, added_ptr + first, column_N, present_N, count, WIDTH, ADDED, M)
    _store_gated(out_ptr + row * WIDTH, gate_MN, up_MN, column_N, present_N, count, WIDTH, M)


@triton.jit(do_not_specialize=["entry", "num_tokens"])
def silu_mul_lora_kernel(
    gate_up_ptr, out_ptr, partial_ptr, shrunk_ptr, arena_ptr, entries_ptr, record_ptr, row_ptr, count_ptr, entry,
    num_tokens,
    WIDTH: tl.constexpr, RECORD_ENTRIES: tl.constexpr, SPLITS: tl.constexpr, RANK_CAP: tl.constexpr,
    RANK_BLOCK: tl.constexpr, M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
    SHRINK: tl.constexpr, EVICT: tl.constexpr, EXACT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid: (BLOCKS blocks of columns each, tiles). ``entry``: B of gate. SHRINK: a program's columns are a split of
    down's shrink, which goes to ``shrunk_ptr``."""
    TOKEN_STRIDE: tl.constexpr = 2 * RANK_CAP
    tile = tl.program_id(1)
    record, row, count, live = load_tile(record_ptr, row_ptr, count_ptr, tile)
    if live:
        gate_b_ptr, gate_rank = load_block(arena_ptr, entries_ptr, record, entry, RECORD_ENTRIES)
        up_b_ptr, up_rank = load_block(arena_ptr, entries_ptr, record, entry + 2, RECORD_ENTRIES)
        partial_ptr += row * TOKEN_STRIDE
        up_partial_ptr = partial_ptr + RANK_CAP
        split_stride = num_tokens * TOKEN_STRIDE
        gate_up_ptr += row * (2 * WIDTH)
        out_ptr += row * WIDTH
        rank_R = tl.arange(0, RANK_BLOCK)
        column_N = tl.program_id(0) * (BLOCK_N * BLOCKS) + tl.arange(0, BLOCK_N)
        if BLOCKS == 1 and not SHRINK:
            present_N = column_N < WIDTH
            gate_b_RN = load_b(gate_b_ptr, rank_R, gate_rank, WIDTH, column_N, present_N, EVICT)
            up_b_RN = load_b(up_b_ptr, rank_R, up_rank, WIDTH, column_N, present_N, EVICT)
            wait(OVERLAP)
            gate_MN, up_MN = _load_pair(gate_up_ptr, gate_up_ptr, column_N, present_N, count, WIDTH, False, M)
            gate_h = load_shrunk(partial_ptr, rank_R, gate_rank, count, split_stride, TOKEN_STRIDE, SPLITS, M)
            up_h = load_shrunk(up_partial_ptr, rank_R, up_rank, count, split_stride, TOKEN_STRIDE, SPLITS, M)
            gate_MN = add_further_ranks(
                gate_MN + product(gate_h, gate_b_RN, M, EXACT), partial_ptr, gate_b_ptr, gate_rank, WIDTH, column_N,
                present_N, count, split_stride, TOKEN_STRIDE, SPLITS, RANK_CAP, RANK_BLOCK, M, EVICT, EXACT,
            )  # fmt: skip
            up_MN = add_further_ranks(
                up_MN + product(up_h, up_b_RN, M, EXACT), up_partial_ptr, up_b_ptr, up_rank, WIDTH, column_N,
                present_N, count, split_stride, TOKEN_STRIDE, SPLITS, RANK_CAP, RANK_BLOCK, M, EVICT, EXACT,
            )  # fmt: skip
            _store_gated(out_ptr, gate_MN, up_MN, column_N, present_N, count, WIDTH, M)
        else:
            wait(OVERLAP)
            gate_h = load_shrunk(partial_ptr, rank_R, gate_rank, count, split_stride, TOKEN_STRIDE, SPLITS, M)
            up_h = load_shrunk(up_partial_ptr, rank_R, up_rank, count, split_stride, TOKEN_STRIDE, SPLITS, M)
            if SHRINK:
                a_ptr, down_rank = load_block(arena_ptr, entries_ptr, record, entry + 3, RECORD_ENTRIES)
                shrunk_MR = tl.zeros([M, RANK_CAP], tl.float32)
            for block in tl.range(0, BLOCKS, num_stages=STAGES):
                block_N = column_N + block * BLOCK_N
                present_N = block_N < WIDTH
                gate_b_RN = load_b(gate_b_ptr, rank_R, gate_rank, WIDTH, block_N, present_N, EVICT)
                up_b_RN = load_b(up_b_ptr, rank_R, up_rank, WIDTH, block_N, present_N, EVICT)
                gate_MN, up_MN = _load_pair(gate_up_ptr, gate_up_ptr, block_N, present_N, count, WIDTH, False, M)
                gate_MN += product(gate_h, gate_b_RN, M, EXACT)
                up_MN += product(up_h, up_b_RN, M, EXACT)
                gated_MN = _store_gated(out_ptr, gate_MN, up_MN, block_N, present_N, count, WIDTH, M)
                if SHRINK:
                    # A is (rank, width) row-major, as every B.
                    a_RN = load_b(a_ptr, rank_R, down_rank, WIDTH, block_N, present_N, EVICT)
                    shrunk_MR = dot(gated_MN, tl.trans(a_RN), shrunk_MR, EXACT)
            if SHRINK:
                token_M = tl.arange(0, M)
                first = (tl.program_id(0).to(tl.int64) * num_tokens + row) * RANK_CAP
                tl.store(
                    shrunk_ptr + first + token_M[:, None] * RANK_CAP + rank_R[None, :],
                    shrunk_MR,
                    mask=(token_M < count)[:, None] & (rank_R < down_rank)[None, :],
                )
    wait(OVERLAP)


@triton.jit
def normed(x_D, weight_D, eps, D: tl.constexpr):
    return x_D * tl.rsqrt(tl.sum(x_D * x_D, 0) / D + eps) * weight_D


@triton.jit
def rms_norm_kernel(x_ptr, weight_ptr, out_ptr, eps, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Grid: (tokens,)."""
    row = tl.program_id(0).to(tl.int64) * D
    column_D = tl.arange(0, BLOCK_D)
    present_D = column_D < D
    x_D = tl.load(x_ptr + row + column_D, mask=present_D, other=0.0)
    weight_D = tl.load(weight_ptr + column_D, mask=present_D, other=0.0).to(tl.float32)
    normed_D = normed(x_D.to(tl.float32), weight_D, eps, D)
    tl.store(out_ptr + row + column_D, normed_D.to(x_D.dtype), mask=present_D)


@triton.jit(do_not_specialize=["entry", "num_tokens"])
def add_rms_norm_kernel(
    residual_ptr, delta_ptr, added_ptr, weight_ptr, out_ptr, partial_ptr, arena_ptr, entries_ptr, token_record_ptr,
    entry, num_tokens, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ADDED: tl.constexpr, LORA: tl.constexpr, RECORD_ENTRIES: tl.constexpr,
    SPLITS: tl.constexpr, RANK_CAP: tl.constexpr, RANK_BLOCK: tl.constexpr, EVICT: tl.constexpr, EXACT: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid: (tokens,). The whole row stays in registers; B passes by in blocks of ranks.

    ADDED: ``added_ptr`` holds the LoRA of delta. LORA: it is still to be expanded.
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
        b_RD = load_b(b_ptr, rank_R, rank, D, column_D, present_D, EVICT)
    wait(OVERLAP)
    residual_D = tl.load(residual_ptr + row + column_D, mask=present_D, other=0.0)
    delta_D = tl.load(delta_ptr + row + column_D, mask=present_D, other=0.0)
    x_D = residual_D.to(tl.float32) + delta_D.to(tl.float32)
    if ADDED:
        x_D += tl.load(added_ptr + row + column_D, mask=present_D, other=0.0).to(tl.float32)
    if LORA:
        partial_ptr += token * RANK_CAP
        split_stride = num_tokens * RANK_CAP
        h_R = load_shrunk(partial_ptr, rank_R, rank, 1, split_stride, RANK_CAP, SPLITS, 1)
        lora_1D = add_further_ranks(
            product(h_R, b_RD, 1, EXACT), partial_ptr, b_ptr, rank, D, column_D, present_D, 1, split_stride,
            RANK_CAP, SPLITS, RANK_CAP, RANK_BLOCK, 1, EVICT, EXACT,
        )  # fmt: skip
        x_D += tl.sum(lora_1D, 0)
    sum_D = x_D.to(residual_D.dtype)
    tl.store(residual_ptr + row + column_D, sum_D, mask=present_D)
    normed_D = normed(sum_D.to(tl.float32), weight_D.to(tl.float32), eps, D)
    tl.store(out_ptr + row + column_D, normed_D.to(residual_D.dtype), mask=present_D)


@triton.jit
def _block_of_rows(start, count, D: tl.constexpr, M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of a block of M rows: its columns, the elements' offsets from the first row, and what of both is there."""
    token_M = tl.arange(0, M)
    column_N = start + tl.arange(0, BLOCK_N)
    present_N = column_N < D
    present_MN = (token_M < count)[:, None]
    if D % BLOCK_N:
        present_MN = present_MN & present_N[None, :]
    else:
        present_N = tl.full([BLOCK_N], True, tl.int1)
    return column_N, token_M[:, None] * D + column_N[None, :], present_N, present_MN


@triton.jit(do_not_specialize=["entry", "num_tokens"])
def add_rms_norm_tiles_kernel(
    residual_ptr, delta_ptr, weight_ptr, out_ptr, partial_ptr, arena_ptr, entries_ptr, record_ptr, row_ptr, count_ptr,
    entry, num_tokens, eps,
    D: tl.constexpr, RECORD_ENTRIES: tl.constexpr, SPLITS: tl.constexpr, RANK_CAP: tl.constexpr, M: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr, EVICT: tl.constexpr, EXACT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid: (M tokens of a tile each, tiles). B is read once for M rows, the new residual twice."""
    record, row, count, live = load_tile(record_ptr, row_ptr, count_ptr, tl.program_id(1))
    first = tl.program_id(0) * M
    row += first
    count -= first
    if live & (count > 0):
        b_ptr, rank = load_block(arena_ptr, entries_ptr, record, entry, RECORD_ENTRIES)
        rank_R = tl.arange(0, RANK_CAP)
        residual_ptr += row * D
        delta_ptr += row * D
        out_ptr += row * D
        split_stride = num_tokens * RANK_CAP
        wait(OVERLAP)
        h = load_shrunk(partial_ptr + row * RANK_CAP, rank_R, rank, count, split_stride, RANK_CAP, SPLITS, M)
        squares_M = tl.zeros([M], tl.float32)
        for start in tl.range(0, D, BLOCK_N, num_stages=STAGES):
            column_N, at_MN, present_N, present_MN = _block_of_rows(start, count, D, M, BLOCK_N)
            b_RN = load_b(b_ptr, rank_R, rank, D, column_N, present_N, EVICT)
            residual_MN = tl.load(residual_ptr + at_MN, mask=present_MN, other=0.0)
            delta_MN = tl.load(delta_ptr + at_MN, mask=present_MN, other=0.0)
            x_MN = residual_MN.to(tl.float32) + delta_MN.to(tl.float32) + product(h, b_RN, M, EXACT)
            sum_MN = x_MN.to(residual_MN.dtype)
            tl.store(residual_ptr + at_MN, sum_MN, mask=present_MN)
            x_MN = sum_MN.to(tl.float32)
            squares_M += tl.sum(x_MN * x_MN, 1)
        scale_M = tl.rsqrt(squares_M / D + eps)
        tl.debug_barrier()
        for start in tl.range(0, D, BLOCK_N, num_stages=STAGES):
            column_N, at_MN, present_N, present_MN = _block_of_rows(start, count, D, M, BLOCK_N)
            weight_N = tl.load(weight_ptr + column_N, mask=present_N, other=0.0).to(tl.float32)
            sum_MN = tl.load(residual_ptr + at_MN, mask=present_MN, other=0.0)
            out_MN = sum_MN.to(tl.float32) * scale_M[:, None] * weight_N[None, :]
            tl.store(out_ptr + at_MN, out_MN.to(sum_MN.dtype), mask=present_MN)
    wait(OVERLAP)


@triton.jit
def embed_kernel(
    token_id_ptr, token_slot_ptr, last_token_ptr, embedding_ptr, weight_ptr, residual_ptr, out_ptr, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid: (tokens,)."""
    token = tl.program_id(0).to(tl.int64)
    column_D = tl.arange(0, BLOCK_D)
    present_D = column_D < D
    token_id = tl.load(token_id_ptr + token)
    slot = tl.load(token_slot_ptr + token)
    sampled = tl.load(last_token_ptr + slot, mask=(token_id < 0) & (slot >= 0), other=0)
    token_id = tl.where(token_id >= 0, token_id, sampled)
    x_D = tl.load(embedding_ptr + token_id.to(tl.int64) * D + column_D, mask=present_D, other=0.0)
    weight_D = tl.load(weight_ptr + column_D, mask=present_D, other=0.0).to(tl.float32)
    tl.store(residual_ptr + token * D + column_D, x_D, mask=present_D)
    normed_D = normed(x_D.to(tl.float32), weight_D, eps, D)
    tl.store(out_ptr + token * D + column_D, normed_D.to(x_D.dtype), mask=present_D)
