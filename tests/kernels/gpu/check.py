"""What the tests of the kernels share: how far a result may be from its reference, and a run of a benchmark."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[3] / "kernels" / "benchmarks"


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """fp32 within 1e-5, bf16 within 1e-2; nothing but finite numbers."""
    assert bool(actual.isfinite().all())
    actual, expected, dtype = actual.double(), expected.double(), actual.dtype
    error = float((actual - expected).norm() / expected.norm())
    assert error <= (1e-5 if dtype == torch.float32 else 1e-2), error


def run_tiny_benchmark(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[dict[str, Any]]:
    """The JSON objects that ``kernels/benchmarks/<name>.py --tiny`` prints, the first one (the place) left out."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", [name, "--tiny"])
    runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()][1:]
