"""The attention kernels: device code alone. ``attention`` checks, chooses blocks and launches.

Loop nest of both: one program = the queries of one KV head (the Q query heads that share it, times one token and a part
of its context in decode or a tile of tokens in prefill); over blocks of keys: page ids, K, scores, online softmax in
fp32 (base 2: the scale holds log2 e), V. FlashAttention-2 (Dao 2023) over pages as in PagedAttention (Kwon et al.
2023).
Legend: N query heads, G KV heads, Q = N / G, H head dim, M rows of a block of queries, K keys of a block.
EXACT computes dots in fp32 whatever the inputs are: for fp32 models, and because Triton's interpreter has no bf16.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl


@triton.jit
def _key_rows(
    page_row_ptr,
    key,
    present,
    layer,
    kv_head,
    MASKED: tl.constexpr,
    NUM_LAYERS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Element offset in the arena of each key's row; its value's row lies G * S * H on.

    The products with constants keep the divisibility that 16-byte loads need, whatever ``layer`` is.
    """
    if MASKED:
        page = tl.load(page_row_ptr + key // PAGE_SIZE, mask=present, other=0)
    else:
        page = tl.load(page_row_ptr + key // PAGE_SIZE)
    tile = (page.to(tl.int64) * NUM_LAYERS + layer) * (2 * NUM_KV_HEADS) + kv_head
    return tile * (PAGE_SIZE * HEAD_DIM) + (key % PAGE_SIZE) * HEAD_DIM


@triton.jit
def _attend(
    acc_MH,
    top_M,
    total_M,
    q_MH,
    position_M,
    begin,
    end,
    page_row_ptr,
    arena_ptr,
    layer,
    kv_head,
    scale_log2,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    NUM_LAYERS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Adds keys [begin, end) to the running (acc, top, total) of each query row.

    Not MASKED: every query sees every key and end - begin is a multiple of BLOCK_KEYS. MASKED: nothing at or past
    ``end`` is read (it may be NaN). CAUSAL: key <= position, and with a WINDOW > 0 key > position - WINDOW.
    """
    dim_H = tl.arange(0, HEAD_DIM)
    for start in tl.range(begin, end, BLOCK_KEYS, num_stages=NUM_STAGES):
        key_K = start + tl.arange(0, BLOCK_KEYS)
        present_K = key_K < end
        row_K = _key_rows(
            page_row_ptr, key_K, present_K, layer, kv_head, MASKED, NUM_LAYERS, NUM_KV_HEADS, PAGE_SIZE, HEAD_DIM
        )
        k_ptr_KH = arena_ptr + (row_K[:, None] + dim_H[None, :])
        v_ptr_KH = k_ptr_KH + NUM_KV_HEADS * PAGE_SIZE * HEAD_DIM
        if MASKED:
            k_KH = tl.load(k_ptr_KH, mask=present_K[:, None], other=0.0)
        else:
            k_KH = tl.load(k_ptr_KH)
        if EXACT:
            k_KH = k_KH.to(tl.float32)
        score_MK = tl.dot(q_MH, tl.trans(k_KH), input_precision="ieee")
        if MASKED:
            seen_MK = present_K[None, :]
            if CAUSAL:
                seen_MK = seen_MK & (key_K[None, :] <= position_M[:, None])
                if WINDOW > 0:
                    seen_MK = seen_MK & (key_K[None, :] > position_M[:, None] - WINDOW)
            score_MK = tl.where(seen_MK, score_MK, float("-inf"))
        new_top_M = tl.maximum(top_M, tl.max(score_MK, 1) * scale_log2)
        if WINDOW > 0:
            # Of a row that has seen no key yet the top is still -inf, and -inf - -inf is NaN.
            base_M = tl.maximum(new_top_M, -1e30)
        else:
            base_M = new_top_M
        weight_MK = tl.exp2(score_MK * scale_log2 - base_M[:, None])
        shrink_M = tl.exp2(top_M - base_M)
        total_M = total_M * shrink_M + tl.sum(weight_MK, 1)
        if MASKED:
            v_KH = tl.load(v_ptr_KH, mask=present_K[:, None], other=0.0)
        else:
            v_KH = tl.load(v_ptr_KH)
        if EXACT:
            v_KH = v_KH.to(tl.float32)
        acc_MH = acc_MH * shrink_M[:, None]
        acc_MH = tl.dot(weight_MK.to(v_KH.dtype), v_KH, acc_MH, input_precision="ieee")
        top_M = new_top_M
    return acc_MH, top_M, total_M


@triton.jit
def _combine(
    partial_ptr,
    lse_ptr,
    first_part,
    num_parts,
    kv_head,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """(Q, H): the parts of a row, weighted by exp2 of their sums, in order."""
    query_Q = tl.arange(0, BLOCK_QUERIES)
    dim_H = tl.arange(0, HEAD_DIM)
    acc_QH = tl.zeros([BLOCK_QUERIES, HEAD_DIM], tl.float32)
    top_Q = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    total_Q = tl.zeros([BLOCK_QUERIES], tl.float32)
    for start in tl.range(0, num_parts, BLOCK_PARTS):
        index_P = start + tl.arange(0, BLOCK_PARTS)
        at_PQ = ((first_part + index_P) * NUM_KV_HEADS + kv_head)[:, None] * GROUP + query_Q[None, :]
        present_PQ = (index_P < num_parts)[:, None] & (query_Q < GROUP)[None, :]
        # What other programs wrote meanwhile is in the L2 cache.
        lse_PQ = tl.load(lse_ptr + at_PQ, mask=present_PQ, other=float("-inf"), cache_modifier=".cg")
        part_PQH = tl.load(
            partial_ptr + (at_PQ[:, :, None] * HEAD_DIM + dim_H[None, None, :]),
            mask=present_PQ[:, :, None],
            other=0.0,
            cache_modifier=".cg",
        )
        new_top_Q = tl.maximum(top_Q, tl.max(lse_PQ, 0))
        # Of queries that are padding the top stays -inf, and -inf - -inf is NaN.
        base_Q = tl.maximum(new_top_Q, -1e30)
        weight_PQ = tl.exp2(lse_PQ - base_Q[None, :])
        shrink_Q = tl.exp2(top_Q - base_Q)
        acc_QH = acc_QH * shrink_Q[:, None] + tl.sum(part_PQH * weight_PQ[:, :, None], 0)
        total_Q = total_Q * shrink_Q + tl.sum(weight_PQ, 0)
        top_Q = new_top_Q
    return acc_QH / tl.where(total_Q > 0, total_Q, 1.0)[:, None]


@triton.jit(do_not_specialize=["layer"])
def decode_kernel(
    q_ptr,
    q_stride,
    parts_ptr,
    page_table_ptr,
    page_table_stride,
    arena_ptr,
    layer,
    out_ptr,
    out_stride,
    partial_ptr,
    lse_ptr,
    arrived_ptr,
    scale_log2,
    GROUP: tl.constexpr,
    PART_FIELDS: tl.constexpr,
    NUM_LAYERS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Grid (G, parts). A row's only part writes ``out``. Of several each leaves a normalised fp32 result and its
    log2-sum-exp2; the last that is done adds them up (stream-K's fix-up, Osama et al. 2023)."""
    kv_head = tl.program_id(0)
    part = tl.program_id(1)
    part_ptr = parts_ptr + part * PART_FIELDS
    token = tl.load(part_ptr).to(tl.int64)
    slot = tl.load(part_ptr + 1).to(tl.int64)
    begin = tl.load(part_ptr + 2)
    end = tl.load(part_ptr + 3)
    first_part = tl.load(part_ptr + 4)
    num_parts = tl.load(part_ptr + 5)
    row = tl.load(part_ptr + 6)
    if num_parts == 0:
        return

    head_M = tl.arange(0, BLOCK_GROUP)
    real_M = head_M < GROUP
    dim_H = tl.arange(0, HEAD_DIM)
    column_MH = ((kv_head * GROUP + head_M) * HEAD_DIM)[:, None] + dim_H[None, :]
    q_MH = tl.load(q_ptr + token * q_stride + column_MH, mask=real_M[:, None], other=0.0)
    if EXACT:
        q_MH = q_MH.to(tl.float32)
    acc_MH, top_M, total_M = _attend(
        tl.zeros([BLOCK_GROUP, HEAD_DIM], tl.float32),
        tl.full([BLOCK_GROUP], float("-inf"), tl.float32),
        tl.zeros([BLOCK_GROUP], tl.float32),
        q_MH,
        head_M,
        begin,
        end,
        page_table_ptr + slot * page_table_stride,
        arena_ptr,
        layer,
        kv_head,
        scale_log2,
        True,
        False,
        0,
        NUM_LAYERS,
        NUM_KV_HEADS,
        PAGE_SIZE,
        HEAD_DIM,
        BLOCK_KEYS,
        NUM_STAGES,
        EXACT,
    )
    # No key: 0 / 1 is the zero that padding rows get.
    divisor_M = tl.where(total_M > 0, total_M, 1.0)
    out_MH = acc_MH / divisor_M[:, None]
    if num_parts == 1:
        tl.store(out_ptr + token * out_stride + column_MH, out_MH.to(out_ptr.dtype.element_ty), mask=real_M[:, None])
    else:
        part_M = (part * NUM_KV_HEADS + kv_head) * GROUP + head_M
        tl.store(lse_ptr + part_M, top_M + tl.log2(divisor_M), mask=real_M)
        tl.store(partial_ptr + (part_M[:, None] * HEAD_DIM + dim_H[None, :]), out_MH, mask=real_M[:, None])
        # All threads have stored before one of them says so.
        tl.debug_barrier()
        arrived_ptr += row * NUM_KV_HEADS + kv_head
        if tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu") == num_parts - 1:
            tl.store(arrived_ptr, 0)
            out_QH = _combine(
                partial_ptr,
                lse_ptr,
                first_part,
                num_parts,
                kv_head,
                GROUP,
                NUM_KV_HEADS,
                HEAD_DIM,
                BLOCK_QUERIES,
                BLOCK_PARTS,
            )
            query_Q = tl.arange(0, BLOCK_QUERIES)
            column_QH = ((kv_head * GROUP + query_Q) * HEAD_DIM)[:, None] + dim_H[None, :]
            tl.store(
                out_ptr + token * out_stride + column_QH,
                out_QH.to(out_ptr.dtype.element_ty),
                mask=(query_Q < GROUP)[:, None],
            )


@triton.jit(do_not_specialize=["layer"])
def prefill_kernel(
    q_ptr,
    q_stride,
    tiles_ptr,
    page_table_ptr,
    page_table_stride,
    arena_ptr,
    layer,
    out_ptr,
    out_stride,
    scale_log2,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    NUM_LAYERS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Grid (G, tiles). Row r of the block is token r // Q of the tile, head r % Q of the group."""
    kv_head = tl.program_id(0)
    tile_ptr = tiles_ptr + tl.program_id(1) * 4
    first_token = tl.load(tile_ptr).to(tl.int64)
    num_tokens = tl.load(tile_ptr + 1)
    position = tl.load(tile_ptr + 2)
    slot = tl.load(tile_ptr + 3).to(tl.int64)
    end = position + num_tokens

    row_M = tl.arange(0, BLOCK_ROWS)
    token_M = row_M // GROUP
    real_M = token_M < num_tokens
    dim_H = tl.arange(0, HEAD_DIM)
    column_M = (kv_head * GROUP + row_M % GROUP) * HEAD_DIM
    q_offset_MH = (token_M * q_stride + column_M)[:, None] + dim_H[None, :]
    q_MH = tl.load(q_ptr + first_token * q_stride + q_offset_MH, mask=real_M[:, None], other=0.0)
    if EXACT:
        q_MH = q_MH.to(tl.float32)
    acc_MH = tl.zeros([BLOCK_ROWS, HEAD_DIM], tl.float32)
    top_M = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total_M = tl.zeros([BLOCK_ROWS], tl.float32)
    page_row_ptr = page_table_ptr + slot * page_table_stride
    if WINDOW > 0:
        masked_from = tl.maximum(position - WINDOW + 1, 0)
    else:
        # Keys that the first token of the tile sees are seen by all of them.
        masked_from = (position + 1) // BLOCK_KEYS * BLOCK_KEYS
        acc_MH, top_M, total_M = _attend(
            acc_MH,
            top_M,
            total_M,
            q_MH,
            position + token_M,
            0,
            masked_from,
            page_row_ptr,
            arena_ptr,
            layer,
            kv_head,
            scale_log2,
            False,
            True,
            WINDOW,
            NUM_LAYERS,
            NUM_KV_HEADS,
            PAGE_SIZE,
            HEAD_DIM,
            BLOCK_KEYS,
            NUM_STAGES,
            EXACT,
        )
    acc_MH, top_M, total_M = _attend(
        acc_MH,
        top_M,
        total_M,
        q_MH,
        position + token_M,
        masked_from,
        end,
        page_row_ptr,
        arena_ptr,
        layer,
        kv_head,
        scale_log2,
        True,
        True,
        WINDOW,
        NUM_LAYERS,
        NUM_KV_HEADS,
        PAGE_SIZE,
        HEAD_DIM,
        BLOCK_KEYS,
        NUM_STAGES,
        EXACT,
    )
    out_MH = acc_MH * (1.0 / tl.where(total_M > 0, total_M, 1.0))[:, None]
    out_offset_MH = (token_M * out_stride + column_M)[:, None] + dim_H[None, :]
    tl.store(
        out_ptr + first_token * out_stride + out_offset_MH,
        out_MH.to(out_ptr.dtype.element_ty),
        mask=real_M[:, None],
    )
