"""Dense projections of the base model, with weights packed once for the device that runs them.

On x86 oneDNN's own blocked layout beats MKL's plain product: two to four times on AMD's processors, where MKL leaves
their vector units idle, and for very wide weights (the LM head) on Intel's. The opaque result of ``pack_weight``
replaces the weight. Called by model_runner. Legend: T tokens, I inputs, O outputs.
"""

import platform
from functools import cache
from pathlib import Path

import torch
from torch.nn import functional

_PACKED_TOKENS_HINT = 32
"""Rows oneDNN blocks the weight for; 32 was within 3 % of the best block for 1 to 1024 rows."""
_MKL_MAX_ELEMENTS = 1 << 24
"""Where MKL is at its best, fp32 weights up to this size stay plain: at 8 rows it is up to 1.5 times as fast there."""


def pack_weight(weight_OI: torch.Tensor) -> torch.Tensor:
    """The weight (O, I) in the layout that ``linear`` wants; nothing else may read the result.

    The choice depends on the processor, dtype and size alone, never on a timing, so that a model computes the same
    numbers after every start.
    """
    if weight_OI.device.type != "cpu" or not _packs(weight_OI.dtype):
        return weight_OI.contiguous()
    if weight_OI.dtype == torch.float32 and weight_OI.numel() <= _MKL_MAX_ELEMENTS and _is_intel():
        return weight_OI.contiguous()
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), _PACKED_TOKENS_HINT)
    return packed


def linear(x_TI: torch.Tensor, packed_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """``x W^T + bias`` as a new (T, O) tensor. ``packed_OI`` comes from ``pack_weight``."""
    if packed_OI.is_mkldnn:
        out_TO: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, packed_OI, bias_O, "none", [], "")
        return out_TO
    return functional.linear(x_TI, packed_OI, bias_O)


def linear_into(x_TI: torch.Tensor, packed_OI: torch.Tensor, out_TO: torch.Tensor) -> torch.Tensor:
    """``x W^T`` in ``out_TO``, which it returns. ``packed_OI`` comes from ``pack_weight``."""
    if packed_OI.is_mkldnn:
        return out_TO.copy_(linear(x_TI, packed_OI))
    return torch.mm(x_TI, packed_OI.t(), out=out_TO)


@cache
def _packs(dtype: torch.dtype) -> bool:
    """On this processor: bfloat16 needs AVX-512 or its like."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch._C._has_mkldnn:
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


@cache
def _is_intel() -> bool:
    """False where the system does not say: packing is then the safer choice."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
