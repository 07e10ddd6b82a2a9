"""The kernels of ``activation`` and ``norm``: one program = one token's row, or a tile x a block of columns.

Legend as in ``_jit``; D features of a row.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from loraplex_kernels.gpu._jit import expand, load_block


@triton.jit
def _silu_mul_tile(
    gate_up_ptr, out_ptr, partial_ptr, gate_b_ptr, gate_rank, up_b_ptr, up_rank, column_N, count, split_stride,
    WIDTH: tl.constexpr, LORA: tl.constexpr, TOKEN_STRIDE: tl.constexpr, SPLITS: tl.constexpr,
    RANK_CAP: tl.constexpr, RANK_BLOCK: tl.constexpr, M: tl.constexpr, EVICT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    token_M = tl.arange(0, M)
    present_N = column_N < WIDTH
    present_MN = (token_M < count)[:, None] & present_N[None, :]
    gate_ptrs = gate_up_ptr + token_M[:, None] * (2 * WIDTH) + column_N[None, :]
    gate_in_MN = tl.load(gate_ptrs, mask=present_MN, other=0.0)
    gate_MN = gate_in_MN.to(tl.float32)
    up_MN = tl.load(gate_ptrs + WIDTH, mask=present_MN, other=0.0).to(tl.float32)
    if LORA:
        gate_MN += expand(
            partial_ptr, gate_b_ptr, gate_rank, WIDTH, column_N, present_N, count, split_stride,
            TOKEN_STRIDE, SPLITS, RANK_CAP, RANK_BLOCK, M, EVICT, EXACT,
        )  # fmt: skip
        up_MN += expand(
            partial_ptr + RANK_CAP, up_b_ptr, up_rank, WIDTH, column_N, present_N, count, split_stride,
            TOKEN_STRIDE, SPLITS, RANK_CAP, RANK_BLOCK, M, EVICT, EXACT,
        )  # fmt: skip
    out_MN = gate_MN * tl.sigmoid(gate_MN) * up_MN
    tl.store(out_ptr + token_M[:, None] * WIDTH + column_N[None, :], out_MN.to(gate_in_MN.dtype), mask=present_MN)


@triton.jit(do_not_specialize=["entry", "num_tokens"])
def silu_mul_kernel(
    gate_up_ptr, out_ptr, partial_ptr, arena_ptr, entries_ptr, record_ptr, row_ptr, count_ptr, entry, num_tokens,
    WIDTH: tl.constexpr, LORA: tl.constexpr, RECORD_ENTRIES: tl.constexpr, SPLITS: tl.constexpr,
    RANK_CAP: tl.constexpr, RANK_BLOCK: tl.constexpr, M: tl.constexpr, BLOCK_N: tl.constexpr,
    INVARIANT: tl.constexpr, EVICT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of columns; tiles, or M tokens each without LoRA)."""
    TOKEN_STRIDE: tl.constexpr = 2 * RANK_CAP
    column_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = tl.program_id(1)
    gate_b_ptr, gate_rank, up_b_ptr, up_rank = gate_up_ptr, 0, gate_up_ptr, 0
    if LORA:
        count = tl.load(count_ptr + tile)
        row = tl.load(row_ptr + tile).to(tl.int64)
        record = tl.load(record_ptr + tile)
        gate_b_ptr, gate_rank = load_block(arena_ptr, entries_ptr, record, entry, RECORD_ENTRIES)
        up_b_ptr, up_rank = load_block(arena_ptr, entries_ptr, record, entry + 2, RECORD_ENTRIES)
        partial_ptr += row * TOKEN_STRIDE
    else:
        row = tile.to(tl.int64) * M
        count = tl.minimum(num_tokens - tile * M, M)
    gate_up_ptr += row * (2 * WIDTH)
    out_ptr += row * WIDTH
    split_stride = num_tokens * TOKEN_STRIDE
    if count > 0:
        if LORA and not INVARIANT:
            if count == 1:
                _silu_mul_tile(
                    gate_up_ptr, out_ptr, partial_ptr, gate_b_ptr, gate_rank, up_b_ptr, up_rank, column_N, count,
                    split_stride, WIDTH, LORA, TOKEN_STRIDE, SPLITS, RANK_CAP, RANK_BLOCK, 1, EVICT, EXACT,
                )  # fmt: skip
            else:
                _silu_mul_tile(
                    gate_up_ptr, out_ptr, partial_ptr, gate_b_ptr, gate_rank, up_b_ptr, up_rank, column_N, count,
                    split_stride, WIDTH, LORA, TOKEN_STRIDE, SPLITS, RANK_CAP, RANK_BLOCK, M, EVICT, EXACT,
                )  # fmt: skip
        else:
            _silu_mul_tile(
                gate_up_ptr, out_ptr, partial_ptr, gate_b_ptr, gate_rank, up_b_ptr, up_rank, column_N, count,
                split_stride, WIDTH, LORA, TOKEN_STRIDE, SPLITS, RANK_CAP, RANK_BLOCK, M, EVICT, EXACT,
            )  # fmt: skip


@triton.jit
def _normed(x_D, weight_D, eps, D: tl.constexpr):
    return x_D * tl.rsqrt(tl.sum(x_D * x_D, 0) / D + eps) * weight_D


@triton.jit
def rms_norm_kernel(x_ptr, weight_ptr, out_ptr, eps, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Grid: (tokens,)."""
    row = tl.program_id(0).to(tl.int64) * D
    column_D = tl.arange(0, BLOCK_D)
    present_D = column_D < D
    x_D = tl.load(x_ptr + row + column_D, mask=present_D, other=0.0)
    weight_D = tl.load(weight_ptr + column_D, mask=present_D, other=0.0).to(tl.float32)
    normed_D = _normed(x_D.to(tl.float32), weight_D, eps, D)
    tl.store(out_ptr + row + column_D, normed_D.to(x_D.dtype), mask=present_D)


@triton.jit(do_not_specialize=["entry", "num_tokens"])
def add_rms_norm_kernel(
    residual_ptr, delta_ptr, weight_ptr, out_ptr, partial_ptr, arena_ptr, entries_ptr, token_record_ptr, entry,
    num_tokens, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, LORA: tl.constexpr, RECORD_ENTRIES: tl.constexpr, SPLITS: tl.constexpr,
    RANK_CAP: tl.constexpr, RANK_BLOCK: tl.constexpr, EVICT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Grid: (tokens,). The whole row stays in registers; B passes by in blocks of ranks."""
    token = tl.program_id(0).to(tl.int64)
    row = token * D
    column_D = tl.arange(0, BLOCK_D)
    present_D = column_D < D
    residual_D = tl.load(residual_ptr + row + column_D, mask=present_D, other=0.0)
    delta_D = tl.load(delta_ptr + row + column_D, mask=present_D, other=0.0)
    weight_D = tl.load(weight_ptr + column_D, mask=present_D, other=0.0).to(tl.float32)
    x_D = residual_D.to(tl.float32) + delta_D.to(tl.float32)
    if LORA:
        record = tl.load(token_record_ptr + token)
        b_ptr, rank = load_block(arena_ptr, entries_ptr, record, entry, RECORD_ENTRIES)
        lora_1D = expand(
            partial_ptr + token * RANK_CAP, b_ptr, rank, D, column_D, present_D, 1, num_tokens * RANK_CAP,
            RANK_CAP, SPLITS, RANK_CAP, RANK_BLOCK, 1, EVICT, EXACT,
        )  # fmt: skip
        x_D += tl.sum(lora_1D, 0)
    sum_D = x_D.to(residual_D.dtype)
    tl.store(residual_ptr + row + column_D, sum_D, mask=present_D)
    normed_D = _normed(sum_D.to(tl.float32), weight_D, eps, D)
    tl.store(out_ptr + row + column_D, normed_D.to(residual_D.dtype), mask=present_D)


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
    normed_D = _normed(x_D.to(tl.float32), weight_D, eps, D)
    tl.store(out_ptr + token * D + column_D, normed_D.to(x_D.dtype), mask=present_D)
