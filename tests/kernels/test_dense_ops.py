"""Norm, rotary, gate and projections against formulas in fp64."""

import math
import sys

import pytest
import torch
from loraplex_kernels import (
    Llama3Scaling,
    add_rms_norm_,
    apply_rotary_,
    linear,
    pack_weight,
    rms_norm,
    rotary_angles,
    rotary_frequencies,
    silu_mul,
)

linear_module = sys.modules[pack_weight.__module__]
CPU = torch.device("cpu")


def norm_fp64(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_rms_norm(dtype: torch.dtype, tolerance: float) -> None:
    x, weight = torch.randn(5, 48).to(dtype), torch.randn(48).to(dtype)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5).double(), norm_fp64(x, weight, 1e-5), rtol=0, atol=tolerance)


def test_rms_norm_of_strided_heads() -> None:
    qkv, weight = torch.randn(3, 40), torch.randn(8)
    heads = qkv[:, :24].view(3, 3, 8)
    torch.testing.assert_close(
        rms_norm(heads, weight, 1e-6).double(), norm_fp64(heads, weight, 1e-6), rtol=0, atol=1e-5
    )


def test_add_rms_norm_updates_the_residual() -> None:
    residual, delta, weight = torch.randn(4, 16), torch.randn(4, 16), torch.randn(16)
    total = residual + delta
    normed = add_rms_norm_(residual, delta, weight, 1e-5)
    torch.testing.assert_close(residual, total, rtol=0, atol=0)
    torch.testing.assert_close(normed.double(), norm_fp64(total, weight, 1e-5), rtol=0, atol=1e-5)


def test_silu_mul() -> None:
    gate_up = torch.randn(4, 24)
    gate, up = gate_up[:, :12].double(), gate_up[:, 12:].double()
    torch.testing.assert_close(silu_mul(gate_up).double(), gate / (1 + (-gate).exp()) * up, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [1, 7, 100])
@pytest.mark.parametrize("intel", [False, True])
@pytest.mark.parametrize("old", [False, True])
def test_linear_of_packed_weights(
    dtype: torch.dtype, num_tokens: int, intel: bool, old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``old``: a processor for which oneDNN packs nothing."""
    monkeypatch.setattr(linear_module, "_is_intel", lambda: intel)
    if old:
        monkeypatch.setattr(linear_module, "_packs", lambda _: False)
    weight, bias, x = torch.randn(40, 24).to(dtype), torch.randn(40).to(dtype), torch.randn(num_tokens, 24).to(dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 0.2
    expected = x.double() @ weight.double().t()
    packed = pack_weight(weight)
    torch.testing.assert_close(linear(x, packed).double(), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(linear(x, packed, bias).double(), expected + bias.double(), rtol=0, atol=tolerance)


def llama3_frequency(index: int, head_dim: int, theta: float, scaling: Llama3Scaling) -> float:
    frequency = math.pow(theta, -2 * index / head_dim)
    wavelength = 2 * math.pi / frequency
    if wavelength < scaling.original_max_positions / scaling.high_freq_factor:
        return frequency
    if wavelength > scaling.original_max_positions / scaling.low_freq_factor:
        return frequency / scaling.factor
    smooth = (scaling.original_max_positions / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def test_llama3_scaling_covers_all_three_bands() -> None:
    scaling = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=256)
    actual = rotary_frequencies(64, 10000.0, scaling, CPU)
    expected = torch.tensor([llama3_frequency(i, 64, 10000.0, scaling) for i in range(32)], dtype=torch.float64)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=0)
    ratios = expected / rotary_frequencies(64, 10000.0, None, CPU).double()
    assert ratios.max() > 0.999
    assert ratios.min() < 0.126
    assert ((ratios > 0.13) & (ratios < 0.99)).any()


def test_rotary_turns_each_pair_by_its_angle_in_place() -> None:
    frequencies = rotary_frequencies(8, 100.0, None, CPU)
    positions = torch.tensor([0, 3, 17])
    fused = torch.randn(3, 40)
    before = fused.clone()
    heads = fused[:, :32].view(3, 4, 8)
    apply_rotary_(heads, rotary_angles(positions, frequencies, torch.float32))
    pairs = before[:, :32].view(3, 4, 2, 4).double()
    turned = torch.complex(pairs[:, :, 0], pairs[:, :, 1]) * torch.exp(
        1j * positions.double()[:, None, None] * frequencies.double()
    )
    expected = torch.stack((turned.real, turned.imag), dim=2).view(3, 4, 8)
    torch.testing.assert_close(heads.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(fused[:, 32:], before[:, 32:], rtol=0, atol=0)
