"""Rotary position embedding in the half-split convention of Hugging Face checkpoints, with Llama 3 frequency scaling.

Owns frequencies, the per-step cos/sin and the rotation; positions come from the caller (model_runner).
Legend: T tokens, N heads, H head dim.
"""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """``rope_type: llama3``: long waves are stretched by ``factor``, short ones kept, others blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RotaryAngles:
    """Of one step, shared by all layers; (T, 1, H) each. ``sin`` carries the sign of the rotated half."""

    cos: torch.Tensor
    sin: torch.Tensor


def rotary_frequencies(
    head_dim: int, theta: float, scaling: Llama3Scaling | None, device: torch.device
) -> torch.Tensor:
    """(H / 2,) fp32 inverse frequencies in radians per token."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    frequencies = 1.0 / (theta**exponents)
    if scaling is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = (scaling.original_max_positions / wavelengths - low) / (high - low)
    blended = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    scaled = torch.where(wavelengths > scaling.original_max_positions / low, frequencies / scaling.factor, blended)
    return torch.where(wavelengths < scaling.original_max_positions / high, frequencies, scaled)


def rotary_angles(positions_T: torch.Tensor, frequencies_F: torch.Tensor, dtype: torch.dtype) -> RotaryAngles:
    """``positions_T``: (T,) int64. Angles are computed in fp32 and stored as ``dtype``, (T, 1, H) each."""
    angles_TF = positions_T.float()[:, None] * frequencies_F
    cos_TF, sin_TF = angles_TF.cos(), angles_TF.sin()
    return RotaryAngles(
        cos=torch.cat((cos_TF, cos_TF), dim=-1)[:, None].to(dtype),
        sin=torch.cat((-sin_TF, sin_TF), dim=-1)[:, None].to(dtype),
    )


def apply_rotary_(qk_TNH: torch.Tensor, angles: RotaryAngles) -> None:
    """Rotates all heads in place: ``x * cos + swap_halves(x) * sin``.

    ``qk_TNH``: (T, N, H), usually the query and key columns of the fused projection; the last dimension is dense.
    """
    num_tokens, num_heads, head_dim = qk_TNH.shape
    swapped_TNH = qk_TNH.view(num_tokens, num_heads, 2, head_dim // 2).flip(2).view(qk_TNH.shape)
    qk_TNH.mul_(angles.cos).addcmul_(swapped_TNH, angles.sin)
