"""How far a kernel may be from its reference: relative L2, by dtype."""

import torch


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """fp32 within 1e-5, bf16 within 1e-2; nothing but finite numbers."""
    assert bool(actual.isfinite().all())
    actual, expected, dtype = actual.double(), expected.double(), actual.dtype
    error = float((actual - expected).norm() / expected.norm())
    assert error <= (1e-5 if dtype == torch.float32 else 1e-2), error
