"""The kernel of ``rotary_kv``. One program = one tile of tokens x a block of heads of one module (q, k or v):
sum of the GEMM's output and of its expand; norm over each head; rotation ``low' = low cos - high sin``,
``high' = high cos + low sin``; queries back in place, keys and values into their page.

Legend as in ``_jit``; N low columns of the block's heads (their first halves; the high columns lie H / 2 further).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from loraplex_kernels.gpu._jit import expand, load_block


@triton.jit
def _rotate_tile(
    qkv_ptr, position_ptr, token_slot_ptr, page_table_ptr, cos_sin_ptr, q_norm_ptr, k_norm_ptr, pages_ptr,
    partial_ptr, b_ptr, rank, count, split_stride, module, first_head, layer, max_pages, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    LAYERS: tl.constexpr, BLOCK_HEADS: tl.constexpr, HAS_NORM: tl.constexpr, LORA: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr, SPLITS: tl.constexpr, RANK_CAP: tl.constexpr, RANK_BLOCK: tl.constexpr,
    M: tl.constexpr, EVICT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = HEAD_DIM // 2
    COLUMNS: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    in_block_N = tl.arange(0, BLOCK_HEADS * HALF)
    head_N = first_head + in_block_N // HALF
    feature_N = in_block_N % HALF
    module_heads = tl.where(module == 0, HEADS, KV_HEADS)
    present_N = head_N < module_heads
    low_N = head_N * HEAD_DIM + feature_N
    fused_N = tl.where(module == 0, 0, tl.where(module == 1, HEADS, HEADS + KV_HEADS)) * HEAD_DIM + low_N
    token_M = tl.arange(0, M)
    slot_M = tl.load(token_slot_ptr + token_M, mask=token_M < count, other=-1)
    live_M = slot_M >= 0
    position_M = tl.load(position_ptr + token_M, mask=live_M, other=0)
    live_MN = live_M[:, None] & present_N[None, :]
    qkv_ptrs = qkv_ptr + token_M[:, None] * COLUMNS + fused_N[None, :]
    low_in_MN = tl.load(qkv_ptrs, mask=live_MN, other=0.0)
    low_MN = low_in_MN.to(tl.float32)
    high_MN = tl.load(qkv_ptrs + HALF, mask=live_MN, other=0.0).to(tl.float32)
    if LORA:
        width = module_heads * HEAD_DIM
        low_MN += expand(
            partial_ptr, b_ptr, rank, width, low_N, present_N, count, split_stride,
            TOKEN_STRIDE, SPLITS, RANK_CAP, RANK_BLOCK, M, EVICT, EXACT,
        )  # fmt: skip
        high_MN += expand(
            partial_ptr, b_ptr, rank, width, low_N + HALF, present_N, count, split_stride,
            TOKEN_STRIDE, SPLITS, RANK_CAP, RANK_BLOCK, M, EVICT, EXACT,
        )  # fmt: skip
    if HAS_NORM:  # noqa: SIM102  (one is known at compile time)
        if module < 2:
            square_MN = low_MN * low_MN + high_MN * high_MN
            mean_H = tl.sum(tl.reshape(square_MN, [M * BLOCK_HEADS, HALF]), 1) / HEAD_DIM
            scale_HF = tl.broadcast_to(tl.rsqrt(mean_H + eps)[:, None], [M * BLOCK_HEADS, HALF])
            scale_MN = tl.reshape(scale_HF, [M, BLOCK_HEADS * HALF])
            if module == 0:
                norm_ptr = q_norm_ptr
            else:
                norm_ptr = k_norm_ptr
            low_MN = low_MN * scale_MN * tl.load(norm_ptr + feature_N).to(tl.float32)[None, :]
            high_MN = high_MN * scale_MN * tl.load(norm_ptr + HALF + feature_N).to(tl.float32)[None, :]
    if module < 2:
        angle_ptrs = cos_sin_ptr + position_M[:, None] * HEAD_DIM + feature_N[None, :]
        cos_MN = tl.load(angle_ptrs, mask=live_M[:, None], other=0.0).to(tl.float32)
        sin_MN = tl.load(angle_ptrs + HALF, mask=live_M[:, None], other=0.0).to(tl.float32)
        rotated_MN = low_MN * cos_MN - high_MN * sin_MN
        high_MN = high_MN * cos_MN + low_MN * sin_MN
        low_MN = rotated_MN
    low_out_MN = low_MN.to(low_in_MN.dtype)
    high_out_MN = high_MN.to(low_in_MN.dtype)
    if module == 0:
        tl.store(qkv_ptrs, low_out_MN, mask=live_MN)
        tl.store(qkv_ptrs + HALF, high_out_MN, mask=live_MN)
    else:
        page_ptrs = page_table_ptr + slot_M.to(tl.int64) * max_pages + position_M // PAGE_SIZE
        page_M = tl.load(page_ptrs, mask=live_M, other=0).to(tl.int64)
        tile_M = ((page_M * LAYERS + layer) * 2 + (module - 1)) * KV_HEADS
        in_tile_M = (position_M % PAGE_SIZE) * HEAD_DIM
        kv_MN = tile_M[:, None] * (PAGE_SIZE * HEAD_DIM) + (
            head_N[None, :] * (PAGE_SIZE * HEAD_DIM) + in_tile_M[:, None] + feature_N[None, :]
        )
        tl.store(pages_ptr + kv_MN, low_out_MN, mask=live_MN)
        tl.store(pages_ptr + kv_MN + HALF, high_out_MN, mask=live_MN)


@triton.jit(do_not_specialize=["layer", "entry", "num_tokens", "max_pages"])
def rotary_write_kv_kernel(
    qkv_ptr, position_ptr, token_slot_ptr, page_table_ptr, cos_sin_ptr, q_norm_ptr, k_norm_ptr, pages_ptr,
    partial_ptr, arena_ptr, entries_ptr, record_ptr, row_ptr, count_ptr, layer, entry, num_tokens, max_pages, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    LAYERS: tl.constexpr, BLOCK_HEADS: tl.constexpr, HAS_NORM: tl.constexpr, LORA: tl.constexpr,
    RECORD_ENTRIES: tl.constexpr, SPLITS: tl.constexpr, RANK_CAP: tl.constexpr, RANK_BLOCK: tl.constexpr,
    M: tl.constexpr, INVARIANT: tl.constexpr, EVICT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of query heads, then of key heads, then of value heads; tiles, or M tokens each without LoRA)."""
    TOKEN_STRIDE: tl.constexpr = 3 * RANK_CAP
    COLUMNS: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    Q_BLOCKS: tl.constexpr = (HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    KV_BLOCKS: tl.constexpr = (KV_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    block = tl.program_id(0)
    tile = tl.program_id(1)
    module = (block >= Q_BLOCKS).to(tl.int32) + (block >= Q_BLOCKS + KV_BLOCKS).to(tl.int32)
    first_block = tl.where(module == 0, 0, tl.where(module == 1, Q_BLOCKS, Q_BLOCKS + KV_BLOCKS))
    first_head = (block - first_block) * BLOCK_HEADS
    if LORA:
        count = tl.load(count_ptr + tile)
        row = tl.load(row_ptr + tile).to(tl.int64)
        b_ptr, rank = load_block(arena_ptr, entries_ptr, tl.load(record_ptr + tile), entry + 2 * module, RECORD_ENTRIES)
        partial_ptr += row * TOKEN_STRIDE + module * RANK_CAP
    else:
        row = tile.to(tl.int64) * M
        count = tl.minimum(num_tokens - tile * M, M)
        b_ptr, rank = qkv_ptr, 0
    qkv_ptr += row * COLUMNS
    position_ptr += row
    token_slot_ptr += row
    split_stride = num_tokens * TOKEN_STRIDE
    if count > 0:
        if LORA and not INVARIANT:
            if count == 1:
                _rotate_tile(
                    qkv_ptr, position_ptr, token_slot_ptr, page_table_ptr, cos_sin_ptr, q_norm_ptr, k_norm_ptr,
                    pages_ptr, partial_ptr, b_ptr, rank, count, split_stride, module, first_head, layer, max_pages, eps,
                    HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, LAYERS, BLOCK_HEADS, HAS_NORM, LORA,
                    TOKEN_STRIDE, SPLITS, RANK_CAP, RANK_BLOCK, 1, EVICT, EXACT,
                )  # fmt: skip
            else:
                _rotate_tile(
                    qkv_ptr, position_ptr, token_slot_ptr, page_table_ptr, cos_sin_ptr, q_norm_ptr, k_norm_ptr,
                    pages_ptr, partial_ptr, b_ptr, rank, count, split_stride, module, first_head, layer, max_pages, eps,
                    HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, LAYERS, BLOCK_HEADS, HAS_NORM, LORA,
                    TOKEN_STRIDE, SPLITS, RANK_CAP, RANK_BLOCK, M, EVICT, EXACT,
                )  # fmt: skip
        else:
            _rotate_tile(
                qkv_ptr, position_ptr, token_slot_ptr, page_table_ptr, cos_sin_ptr, q_norm_ptr, k_norm_ptr,
                pages_ptr, partial_ptr, b_ptr, rank, count, split_stride, module, first_head, layer, max_pages, eps,
                HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, LAYERS, BLOCK_HEADS, HAS_NORM, LORA,
                TOKEN_STRIDE, SPLITS, RANK_CAP, RANK_BLOCK, M, EVICT, EXACT,
            )  # fmt: skip
