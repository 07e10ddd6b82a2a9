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


def sum_rows_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where kernels are interpreted: a row of a dot does not depend on its place, as on a GPU. The interpreter
    multiplies by BLAS, whose order of a sum differs between the first rows of a matrix and the last."""
    if torch.cuda.is_available():
        return
    from triton.runtime import interpreter

    def dot(_builder: Any, a: Any, b: Any, acc: Any, _precision: Any, _imprecise: Any) -> Any:
        product = (a.data[..., :, None, :] * b.data.swapaxes(-1, -2)[..., None, :, :]).sum(axis=-1)
        return interpreter.TensorHandle(product + acc.data, acc.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


def run_tiny_benchmark(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[dict[str, Any]]:
    """The JSON objects that ``kernels/benchmarks/<name>.py --tiny`` prints, the first one (the place) left out."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", [name, "--tiny"])
    runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()][1:]
