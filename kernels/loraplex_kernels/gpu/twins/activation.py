"""SiLU-mul in plain torch."""

import torch
from torch.nn import functional

from loraplex_kernels.gpu.lora_table import PendingExpand
from loraplex_kernels.gpu.twins.lora import expanded


def silu_mul(
    gate_up_TJ: torch.Tensor, out_TI: torch.Tensor, *, lora: PendingExpand | torch.Tensor | None = None
) -> None:
    width = out_TI.shape[1]
    gate_TI, up_TI = expanded(gate_up_TJ, lora, (width, width)).chunk(2, dim=-1)
    out_TI.copy_(functional.silu(gate_TI) * up_TI)
