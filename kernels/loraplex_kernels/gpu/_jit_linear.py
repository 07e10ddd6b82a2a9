"""The kernel of ``linear``: one program = one block of the output, over the input features in order.

Legend: M rows of a block, N columns of a block, K input features of a block.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton
import triton.language as tl

from loraplex_kernels.gpu._jit import dot

_GROUP = tl.constexpr(8)
"""Blocks of rows whose programs follow each other for each block of columns: they find its weights in the cache."""


@triton.jit(do_not_specialize=["num_rows"])
def linear_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, num_rows,
    N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of rows * blocks of columns,)."""
    BLOCKS_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    blocks_m = tl.cdiv(num_rows, BLOCK_M)
    program = tl.program_id(0)
    first_block = program // (_GROUP * BLOCKS_N) * _GROUP
    group = tl.minimum(blocks_m - first_block, _GROUP)
    in_group = program % (_GROUP * BLOCKS_N)
    first_row = ((first_block + in_group % group) * BLOCK_M).to(tl.int64)
    first_column = (in_group // group * BLOCK_N).to(tl.int64)

    row_M = tl.arange(0, BLOCK_M)
    column_N = tl.arange(0, BLOCK_N)
    in_block_K = tl.arange(0, BLOCK_K)
    present_M = first_row + row_M < num_rows
    present_N = first_column + column_N < N
    x_ptrs = x_ptr + first_row * K + (row_M[:, None] * K + in_block_K[None, :])
    weight_ptrs = weight_ptr + first_column * K + (column_N[:, None] * K + in_block_K[None, :])
    acc_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        present_MK = present_M[:, None]
        present_NK = present_N[:, None]
        if K % BLOCK_K != 0:
            present_MK = present_MK & (start + in_block_K < K)[None, :]
            present_NK = present_NK & (start + in_block_K < K)[None, :]
        x_MK = tl.load(x_ptrs + start, mask=present_MK, other=0.0)
        if N % BLOCK_N == 0 and K % BLOCK_K == 0:
            weight_NK = tl.load(weight_ptrs + start)
        else:
            weight_NK = tl.load(weight_ptrs + start, mask=present_NK, other=0.0)
        acc_MN = dot(x_MK, tl.trans(weight_NK), acc_MN, EXACT)
    if bias_ptr is not None:
        acc_MN += tl.load(bias_ptr + first_column + column_N, mask=present_N, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + first_row * N + first_column + (row_M[:, None] * N + column_N[None, :])
    tl.store(out_ptrs, acc_MN.to(out_ptr.dtype.element_ty), mask=present_M[:, None] & present_N[None, :])
