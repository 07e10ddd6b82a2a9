"""RMSNorm. Owns the operation alone: weights and residuals are the caller's. Called by model_runner's decoder body.

Legend: T tokens, D features.
"""

import torch
from torch.nn import functional


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension; returns a new tensor like ``x_TD``.

    ``x_TD``: (..., D), any strides. ``weight_D``: (D,). Half types are reduced in fp32.
    """
    return functional.rms_norm(x_TD, weight_D.shape, weight_D, eps)


def add_rms_norm_(
    residual_TD: torch.Tensor, delta_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> torch.Tensor:
    """``residual += delta`` in place, then the norm of the sum, which is returned as a new (T, D) tensor."""
    return functional.rms_norm(residual_TD.add_(delta_TD), weight_D.shape, weight_D, eps)
