"""Projections of which a row's bits do not depend on the other rows."""

import pytest
import torch
from loraplex_kernels.gpu.linear import LinearBlocks, linear, linear_blocks
from loraplex_kernels.gpu.twins import linear as twin

from tests.kernels.gpu.check import assert_close, run_tiny_benchmark, sum_rows_alike

ODD = (72, 199)
"""(K, N): multiples of no block."""
LLAMA_8B = {"qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 28672), "down": (14336, 4096)}
ROWS = (1, 3, 64, 65, 130, 256, 300, 1000, 2048)
"""Each kind of block, full ones and others."""


def random(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(*shape).to(device, dtype)


def run(x_TK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
    out_TN = torch.full((x_TK.shape[0], weight_NK.shape[0]), float("nan"), dtype=x_TK.dtype, device=x_TK.device)
    linear(x_TK, weight_NK, out_TN, bias_N=bias_N)
    return out_TN


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("num_rows", [0, 1, 70])
def test_equals_the_reference(num_rows: int, with_bias: bool, dtype: torch.dtype, device: torch.device) -> None:
    x_TK = random(num_rows, ODD[0], dtype=dtype, device=device)
    weight_NK = random(*reversed(ODD), dtype=dtype, device=device)
    bias_N = random(ODD[1], dtype=dtype, device=device) if with_bias else None
    out_TN = run(x_TK, weight_NK, bias_N)
    if num_rows:
        assert_close(out_TN, x_TK.double() @ weight_NK.double().T + (0.0 if bias_N is None else bias_N.double()))
    expected = torch.empty_like(out_TN)
    twin.linear(x_TK, weight_NK, expected, bias_N=bias_N)
    assert torch.allclose(out_TN, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "blocks",
    [
        LinearBlocks(rows=64, columns=32, features=128, num_warps=4, num_stages=4),
        LinearBlocks(rows=64, columns=128, features=128, num_warps=4, num_stages=2),
        LinearBlocks(rows=128, columns=256, features=64, num_warps=8, num_stages=3),
    ],
)
def test_every_block_covers_the_output(blocks: LinearBlocks, device: torch.device) -> None:
    """More blocks of rows than follow each other, in a last group that is not full."""
    x_TK = random(9 * blocks.rows + 1, 24, dtype=torch.bfloat16, device=device)
    weight_NK = random(blocks.columns + 8, 24, dtype=torch.bfloat16, device=device)
    out_TN = torch.full((x_TK.shape[0], weight_NK.shape[0]), float("nan"), dtype=x_TK.dtype, device=device)
    linear(x_TK, weight_NK, out_TN, blocks=blocks)
    assert_close(out_TN, x_TK.double() @ weight_NK.double().T)


def test_a_row_does_not_depend_on_the_others(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, and at several places among others."""
    sum_rows_alike(monkeypatch)
    x_TK = random(70, 100, dtype=torch.float32, device=device)
    weight_NK = random(199, 100, dtype=torch.float32, device=device)
    together = run(x_TK, weight_NK)
    for first, last in [(0, 1), (5, 6), (69, 70), (3, 40), (31, 33)]:
        assert torch.equal(run(x_TK[first:last].contiguous(), weight_NK), together[first:last])


def test_few_rows_have_blocks_for_all_multiprocessors() -> None:
    for in_features, out_features in LLAMA_8B.values():
        for num_rows in (1, 32, 100, 256):
            blocks = linear_blocks(num_rows, out_features, torch.bfloat16)
            assert blocks.rows >= min(num_rows, 64)
            assert -(-num_rows // blocks.rows) * -(-out_features // blocks.columns) >= 128
            assert in_features % blocks.features == 0
    assert len({linear_blocks(num_rows, 4096, torch.float32) for num_rows in ROWS}) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("site", LLAMA_8B)
def test_all_blocks_give_a_row_the_same_bits(site: str) -> None:
    device = torch.device("cuda")
    in_features, out_features = LLAMA_8B[site]
    x_TK = random(max(ROWS), in_features, dtype=torch.bfloat16, device=device)
    weight_NK = random(out_features, in_features, dtype=torch.bfloat16, device=device) * in_features**-0.5
    full = run(x_TK, weight_NK)
    assert_close(full, x_TK.float() @ weight_NK.float().T)
    for num_rows in ROWS:
        for first in (0, 7, max(ROWS) - num_rows):
            rows = slice(first, first + num_rows)
            if rows.stop <= max(ROWS):
                assert torch.equal(run(x_TK[rows].contiguous(), weight_NK), full[rows]), (num_rows, first)


def test_benchmark_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    results = run_tiny_benchmark("bench_linear", monkeypatch, capsys)
    assert {result["rows"] for result in results} == {1, 70}
    assert all(result["error"] < 1e-2 for result in results)
