"""SiLU-mul, the gate of the feed-forward block. Called by model_runner's decoder body.

Legend: T tokens, I intermediate features.
"""

import torch
from torch.nn import functional


def silu_mul(gate_up_TJ: torch.Tensor) -> torch.Tensor:
    """(T, 2I), gate columns first -> new (T, I): ``silu(gate) * up``."""
    gate_TI, up_TI = gate_up_TJ.chunk(2, dim=-1)
    return functional.silu(gate_TI).mul_(up_TI)
