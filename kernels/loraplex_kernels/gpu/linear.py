"""Dense projections whose rows do not depend on each other's number: ``x W^T + bias`` for batch-invariant steps.

A library's GEMM picks its kernel, and with it the order of each sum, by the number of rows. Here an element is one
fp32 sum over the input features in order, never split over programs and rounded once, after the bias. Blocks of other
sizes serve other numbers of rows; in 16-bit dtypes all of them are at least 64 rows high, so that a GPU with warpgroup
matrix instructions runs the same instruction on the same 16 features for every element, only more of them side by side.
In fp32 there is one block size. The idea is that of "Defeating Nondeterminism in LLM Inference" (He et al., 2025).
Called by model_runner. Legend: T tokens, K input features, N output features.
"""

from dataclasses import dataclass

import torch
import triton

from loraplex_kernels.gpu._jit_linear import linear_kernel
from loraplex_kernels.gpu.tuning import exact


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearBlocks:
    """Launch parameters: what one program computes, and how much of the inputs it loads at a time."""

    rows: int
    columns: int
    features: int
    num_warps: int
    num_stages: int


_NARROW = 8192
"""Output features up to which few rows take narrow blocks, so that every SM has one."""
_ALL_SMS = 120
"""Programs from which the widest block is best."""
_BLOCKS_FP32 = LinearBlocks(rows=32, columns=64, features=32, num_warps=4, num_stages=2)


def linear_blocks(num_rows: int, out_features: int, dtype: torch.dtype) -> LinearBlocks:
    """By size alone. The result's bits are the same for all of them."""
    if dtype == torch.float32:
        return _BLOCKS_FP32
    narrow = out_features <= _NARROW
    if num_rows <= 64:
        if narrow:
            return LinearBlocks(rows=64, columns=32, features=128, num_warps=4, num_stages=4)
        return LinearBlocks(rows=64, columns=128, features=128, num_warps=4, num_stages=2)
    if num_rows <= 256 and narrow:
        return LinearBlocks(rows=128, columns=32 if num_rows <= 128 else 64, features=64, num_warps=4, num_stages=4)
    if triton.cdiv(num_rows, 128) * triton.cdiv(out_features, 256) < _ALL_SMS or num_rows <= 256:
        return LinearBlocks(rows=128, columns=128, features=64, num_warps=8, num_stages=3)
    return LinearBlocks(rows=128, columns=256, features=64, num_warps=8, num_stages=3)


def linear(
    x_TK: torch.Tensor,
    weight_NK: torch.Tensor,
    out_TN: torch.Tensor,
    *,
    bias_N: torch.Tensor | None = None,
    blocks: LinearBlocks | None = None,
) -> None:
    """Writes ``x W^T + bias``. All dense and of one dtype. A row of ``out_TN`` depends on its row of ``x_TK`` and on
    the weight: on no other row, and not on how many there are."""
    num_rows, in_features = x_TK.shape
    out_features = weight_NK.shape[0]
    assert weight_NK.shape == (out_features, in_features), "the weight is (N, K)"
    assert out_TN.shape == (num_rows, out_features), "the output is (T, N)"
    assert x_TK.dtype == weight_NK.dtype == out_TN.dtype, "input, weight and output have one dtype"
    assert x_TK.is_contiguous()
    assert weight_NK.is_contiguous()
    assert out_TN.is_contiguous()
    if num_rows == 0:
        return
    if blocks is None:
        blocks = linear_blocks(num_rows, out_features, x_TK.dtype)
    linear_kernel[(triton.cdiv(num_rows, blocks.rows) * triton.cdiv(out_features, blocks.columns),)](
        x_TK,
        weight_NK,
        bias_N,
        out_TN,
        num_rows,
        N=out_features,
        K=in_features,
        BLOCK_M=blocks.rows,
        BLOCK_N=blocks.columns,
        BLOCK_K=blocks.features,
        STAGES=blocks.num_stages,
        EXACT=exact(x_TK.dtype),
        num_warps=blocks.num_warps,
    )
