"""The kernel of ``rotary_kv``. One program = one tile of tokens x a block of heads of one module (q, k or v):
sum of the GEMM's output and of its expand; norm over each head; rotation ``low' = low cos - high sin``,
``high' = high cos + low sin``; queries back in place, keys and values into their page.

Legend as in ``_jit``; N low columns of the block's heads (their first halves; the high columns lie H / 2 further).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from loraplex_kernels.gpu._jit import add_further_ranks, load_b, load_block, load_shrunk, load_tile, product, wait


@triton.jit
def _columns(
    module, first_head, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_HEADS: tl.constexpr
):
    """Of a block's low columns: head, feature in it, column in the module, column in qkv, whether it exists."""
    HALF: tl.constexpr = HEAD_DIM // 2
    in_block_N = tl.arange(0, BLOCK_HEADS * HALF)
    head_N = first_head + in_block_N // HALF
    feature_N = in_block_N % HALF
    low_N = head_N * HEAD_DIM + feature_N
    fused_N = tl.where(module == 0, 0, tl.where(module == 1, HEADS, HEADS + KV_HEADS)) * HEAD_DIM + low_N
    return head_N, feature_N, low_N, fused_N, head_N < tl.where(module == 0, HEADS, KV_HEADS)


@triton.jit
def _load_heads(
    qkv_ptr, added_ptr, fused_N, live_MN, COLUMNS: tl.constexpr, HALF: tl.constexpr, ADDED: tl.constexpr,
    M: tl.constexpr,
):  # fmt: skip
    """Low and high halves, (M, N) fp32 each."""
    low_MN = tl.arange(0, M)[:, None] * COLUMNS + fused_N[None, :]
    low = tl.load(qkv_ptr + low_MN, mask=live_MN, other=0.0).to(tl.float32)
    high = tl.load(qkv_ptr + low_MN + HALF, mask=live_MN, other=0.0).to(tl.float32)
    if ADDED:
        low += tl.load(added_ptr + low_MN, mask=live_MN, other=0.0).to(tl.float32)
        high += tl.load(added_ptr + low_MN + HALF, mask=live_MN, other=0.0).to(tl.float32)
    return low, high


@triton.jit
def _load_places(
    position_ptr, token_slot_ptr, page_table_ptr, cos_sin_ptr, feature_N, count, module, layer, max_pages,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, LAYERS: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """What the tokens have for all heads of a module: which are not padding; cosines and sines, (M, N) fp32, 1 and 0
    for values, which are not rotated; where head 0 lies in the tokens' pages, for keys and values."""
    token_M = tl.arange(0, M)
    slot_M = tl.load(token_slot_ptr + token_M, mask=token_M < count, other=-1)
    live_M = slot_M >= 0
    position_M = tl.load(position_ptr + token_M, mask=live_M, other=0)
    rotated_M1 = (live_M & (token_M < tl.where(module < 2, count, 0)))[:, None]
    angle_ptr_MN = cos_sin_ptr + position_M[:, None] * HEAD_DIM + feature_N[None, :]
    cos_MN = tl.load(angle_ptr_MN, mask=rotated_M1, other=1.0).to(tl.float32)
    sin_MN = tl.load(angle_ptr_MN + HEAD_DIM // 2, mask=rotated_M1, other=0.0).to(tl.float32)
    page_ptr_M = page_table_ptr + slot_M.to(tl.int64) * max_pages + position_M // PAGE_SIZE
    page_M = tl.load(page_ptr_M, mask=live_M & (token_M < tl.where(module > 0, count, 0)), other=0).to(tl.int64)
    tile_M = ((page_M * LAYERS + layer) * 2 + (module - 1)) * KV_HEADS
    return live_M, cos_MN, sin_MN, (tile_M * PAGE_SIZE + position_M % PAGE_SIZE) * HEAD_DIM


@triton.jit
def _rotate_store(
    qkv_ptr, q_norm_ptr, k_norm_ptr, pages_ptr, low_MN, high_MN, cos_MN, sin_MN, place_M, head_N, feature_N, fused_N,
    live_MN, module, eps,
    HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    HAS_NORM: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = HEAD_DIM // 2
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
    low_out_MN = (low_MN * cos_MN - high_MN * sin_MN).to(qkv_ptr.dtype.element_ty)
    high_out_MN = (high_MN * cos_MN + low_MN * sin_MN).to(qkv_ptr.dtype.element_ty)
    if module == 0:
        out_ptr_MN = qkv_ptr + (tl.arange(0, M)[:, None] * COLUMNS + fused_N[None, :])
    else:
        out_ptr_MN = pages_ptr + place_M[:, None] + (head_N * (PAGE_SIZE * HEAD_DIM) + feature_N)[None, :]
    tl.store(out_ptr_MN, low_out_MN, mask=live_MN)
    tl.store(out_ptr_MN + HALF, high_out_MN, mask=live_MN)


@triton.jit
def _module_of(program, Q_PROGRAMS: tl.constexpr, KV_PROGRAMS: tl.constexpr):
    """(module, index of the program in it): query heads come first, then key heads, then value heads."""
    module = (program >= Q_PROGRAMS).to(tl.int32) + (program >= Q_PROGRAMS + KV_PROGRAMS).to(tl.int32)
    return module, program - tl.where(module == 0, 0, tl.where(module == 1, Q_PROGRAMS, Q_PROGRAMS + KV_PROGRAMS))


@triton.jit(do_not_specialize=["layer", "max_pages"])
def rotary_write_kv_kernel(
    qkv_ptr, position_ptr, token_slot_ptr, page_table_ptr, cos_sin_ptr, q_norm_ptr, k_norm_ptr, pages_ptr,
    added_ptr, layer, max_pages, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    LAYERS: tl.constexpr, BLOCK_HEADS: tl.constexpr, HAS_NORM: tl.constexpr, ADDED: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of heads, tokens). ADDED: ``added_ptr`` holds the LoRA of q, k and v."""
    wait(OVERLAP)
    COLUMNS: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    Q_PROGRAMS: tl.constexpr = (HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    KV_PROGRAMS: tl.constexpr = (KV_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    module, index = _module_of(tl.program_id(0), Q_PROGRAMS, KV_PROGRAMS)
    row = tl.program_id(1).to(tl.int64)
    head_N, feature_N, _, fused_N, present_N = _columns(
        module, index * BLOCK_HEADS, HEADS, KV_HEADS, HEAD_DIM, BLOCK_HEADS
    )
    qkv_ptr += row * COLUMNS
    live_M, cos_MN, sin_MN, place_M = _load_places(
        position_ptr + row, token_slot_ptr + row, page_table_ptr, cos_sin_ptr, feature_N, 1, module, layer, max_pages,
        KV_HEADS, HEAD_DIM, PAGE_SIZE, LAYERS, 1,
    )  # fmt: skip
    live_MN = live_M[:, None] & present_N[None, :]
    low_MN, high_MN = _load_heads(
        qkv_ptr, added_ptr + row * COLUMNS, fused_N, live_MN, COLUMNS, HEAD_DIM // 2, ADDED, 1
    )
    _rotate_store(
        qkv_ptr, q_norm_ptr, k_norm_ptr, pages_ptr, low_MN, high_MN, cos_MN, sin_MN, place_M, head_N, feature_N,
        fused_N, live_MN, module, eps, HEAD_DIM, PAGE_SIZE, COLUMNS, BLOCK_HEADS, HAS_NORM, 1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["layer", "entry", "num_tokens", "max_pages"])
def rotary_write_kv_lora_kernel(
    qkv_ptr, position_ptr, token_slot_ptr, page_table_ptr, cos_sin_ptr, q_norm_ptr, k_norm_ptr, pages_ptr,
    partial_ptr, arena_ptr, entries_ptr, record_ptr, row_ptr, count_ptr, layer, entry, num_tokens, max_pages, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    LAYERS: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr, HAS_NORM: tl.constexpr,
    RECORD_ENTRIES: tl.constexpr, SPLITS: tl.constexpr, RANK_CAP: tl.constexpr, RANK_BLOCK: tl.constexpr,
    M: tl.constexpr, EVICT: tl.constexpr, EXACT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid: (BLOCKS blocks of heads each, tiles)."""
    HALF: tl.constexpr = HEAD_DIM // 2
    TOKEN_STRIDE: tl.constexpr = 3 * RANK_CAP
    COLUMNS: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    PROGRAM_HEADS: tl.constexpr = BLOCK_HEADS * BLOCKS
    Q_PROGRAMS: tl.constexpr = (HEADS + PROGRAM_HEADS - 1) // PROGRAM_HEADS
    KV_PROGRAMS: tl.constexpr = (KV_HEADS + PROGRAM_HEADS - 1) // PROGRAM_HEADS
    module, index = _module_of(tl.program_id(0), Q_PROGRAMS, KV_PROGRAMS)
    record, row, count, live = load_tile(record_ptr, row_ptr, count_ptr, tl.program_id(1))
    if live:
        b_ptr, rank = load_block(arena_ptr, entries_ptr, record, entry + 2 * module, RECORD_ENTRIES)
        width = tl.where(module == 0, HEADS, KV_HEADS) * HEAD_DIM
        rank_R = tl.arange(0, RANK_BLOCK)
        partial_ptr += row * TOKEN_STRIDE + module * RANK_CAP
        split_stride = num_tokens * TOKEN_STRIDE
        qkv_ptr += row * COLUMNS
        position_ptr += row
        token_slot_ptr += row
        if BLOCKS == 1:
            head_N, feature_N, low_N, fused_N, present_N = _columns(
                module, index * BLOCK_HEADS, HEADS, KV_HEADS, HEAD_DIM, BLOCK_HEADS
            )
            low_b_RN = load_b(b_ptr, rank_R, rank, width, low_N, present_N, EVICT)
            high_b_RN = load_b(b_ptr, rank_R, rank, width, low_N + HALF, present_N, EVICT)
            wait(OVERLAP)
            live_M, cos_MN, sin_MN, place_M = _load_places(
                position_ptr, token_slot_ptr, page_table_ptr, cos_sin_ptr, feature_N, count, module, layer, max_pages,
                KV_HEADS, HEAD_DIM, PAGE_SIZE, LAYERS, M,
            )  # fmt: skip
            live_MN = live_M[:, None] & present_N[None, :]
            low_MN, high_MN = _load_heads(qkv_ptr, qkv_ptr, fused_N, live_MN, COLUMNS, HALF, False, M)
            h = load_shrunk(partial_ptr, rank_R, rank, count, split_stride, TOKEN_STRIDE, SPLITS, M)
            low_MN = add_further_ranks(
                low_MN + product(h, low_b_RN, M, EXACT), partial_ptr, b_ptr, rank, width, low_N, present_N, count,
                split_stride, TOKEN_STRIDE, SPLITS, RANK_CAP, RANK_BLOCK, M, EVICT, EXACT,
            )  # fmt: skip
            high_MN = add_further_ranks(
                high_MN + product(h, high_b_RN, M, EXACT), partial_ptr, b_ptr, rank, width, low_N + HALF, present_N,
                count, split_stride, TOKEN_STRIDE, SPLITS, RANK_CAP, RANK_BLOCK, M, EVICT, EXACT,
            )  # fmt: skip
            _rotate_store(
                qkv_ptr, q_norm_ptr, k_norm_ptr, pages_ptr, low_MN, high_MN, cos_MN, sin_MN, place_M, head_N,
                feature_N, fused_N, live_MN, module, eps, HEAD_DIM, PAGE_SIZE, COLUMNS, BLOCK_HEADS, HAS_NORM, M,
            )  # fmt: skip
        else:
            wait(OVERLAP)
            feature_N = tl.arange(0, BLOCK_HEADS * HALF) % HALF
            live_M, cos_MN, sin_MN, place_M = _load_places(
                position_ptr, token_slot_ptr, page_table_ptr, cos_sin_ptr, feature_N, count, module, layer, max_pages,
                KV_HEADS, HEAD_DIM, PAGE_SIZE, LAYERS, M,
            )  # fmt: skip
            h = load_shrunk(partial_ptr, rank_R, rank, count, split_stride, TOKEN_STRIDE, SPLITS, M)
            for block in tl.range(0, BLOCKS, num_stages=STAGES):
                head_N, _, low_N, fused_N, present_N = _columns(
                    module, (index * BLOCKS + block) * BLOCK_HEADS, HEADS, KV_HEADS, HEAD_DIM, BLOCK_HEADS
                )
                live_MN = live_M[:, None] & present_N[None, :]
                low_b_RN = load_b(b_ptr, rank_R, rank, width, low_N, present_N, EVICT)
                high_b_RN = load_b(b_ptr, rank_R, rank, width, low_N + HALF, present_N, EVICT)
                low_MN, high_MN = _load_heads(qkv_ptr, qkv_ptr, fused_N, live_MN, COLUMNS, HALF, False, M)
                low_MN += product(h, low_b_RN, M, EXACT)
                high_MN += product(h, high_b_RN, M, EXACT)
                _rotate_store(
                    qkv_ptr, q_norm_ptr, k_norm_ptr, pages_ptr, low_MN, high_MN, cos_MN, sin_MN, place_M, head_N,
                    feature_N, fused_N, live_MN, module, eps, HEAD_DIM, PAGE_SIZE, COLUMNS, BLOCK_HEADS, HAS_NORM, M,
                )  # fmt: skip
    wait(OVERLAP)
