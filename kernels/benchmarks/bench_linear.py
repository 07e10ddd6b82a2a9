"""Batch-invariant projections on one GPU beside cuBLAS: Llama-3.1-8B's shapes by number of rows.

Every case is checked against the twin, then timed as a CUDA graph over distinct weights, more than the L2 cache holds;
medians, milliseconds of one product. ``share`` is cuBLAS's time over ours, ``bytes_per_s`` counts input, weight and
output once. ``--variants`` also times other blocks, for ``loraplex_kernels.gpu.linear.linear_blocks``. Prints one JSON
object a line: the place, then the cases.

    python kernels/benchmarks/bench_linear.py                          # half a minute
    TRITON_INTERPRET=1 python kernels/benchmarks/bench_linear.py --tiny   # any machine: does it run and is it right
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict

import torch
import triton
from graph_timing import compile_apart, median_ms, relative_error
from loraplex_kernels.gpu.linear import LinearBlocks, linear, linear_blocks
from loraplex_kernels.gpu.twins import linear as twin
from torch.nn import functional

DTYPE = torch.bfloat16
MAX_ERROR = 1e-2
CACHE_BYTES = 256 << 20
"""Weights between two uses of one: several times the L2 cache."""
SHAPES: Mapping[str, tuple[int, int]] = {
    "qkv": (4096, 6144),
    "o": (4096, 4096),
    "gate_up": (4096, 28672),
    "down": (14336, 4096),
    "lm_head": (4096, 128256),
}
"""(K, N)."""
TINY_SHAPES = {"tiny": (72, 199)}
ROWS = (1, 32, 64, 128, 256, 512, 2048, 8192)
TINY_ROWS = (1, 70)
MAX_HEAD_ROWS = 256
"""The LM head sees no more than the rows that sample."""
VARIANTS = [
    LinearBlocks(rows=rows, columns=columns, features=features, num_warps=warps, num_stages=stages)
    for rows, columns, features, warps, stages in (
        (64, 32, 64, 4, 6),
        (64, 64, 64, 4, 5),
        (64, 64, 128, 4, 3),
        (64, 128, 64, 4, 3),
        (64, 128, 64, 4, 4),
        (128, 64, 64, 4, 3),
        (128, 128, 64, 4, 3),
        (128, 128, 64, 8, 4),
        (128, 256, 64, 8, 4),
    )
]


def worth_trying(num_rows: int) -> list[LinearBlocks]:
    if num_rows <= 64:
        return [blocks for blocks in VARIANTS if blocks.rows == 64]
    return [blocks for blocks in VARIANTS if blocks.rows == 128]


def candidates(num_rows: int, out_features: int, variants: bool) -> list[LinearBlocks]:
    """The block that is in use comes first."""
    chosen = linear_blocks(num_rows, out_features, DTYPE)
    others = worth_trying(num_rows) if variants else []
    return [chosen, *(blocks for blocks in others if blocks != chosen)]


def compile_one(job: tuple[int, int, int, LinearBlocks]) -> None:
    num_rows, in_features, out_features, blocks = job
    x_TK, weight_NK, out_TN = tensors(num_rows, in_features, out_features, torch.device("cuda"))
    linear(x_TK, weight_NK, out_TN, blocks=blocks)


def tensors(
    num_rows: int, in_features: int, out_features: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x_TK = torch.empty((num_rows, in_features), dtype=DTYPE, device=device).normal_()
    weight_NK = torch.empty((out_features, in_features), dtype=DTYPE, device=device).normal_(std=in_features**-0.5)
    return x_TK, weight_NK, torch.full((num_rows, out_features), float("nan"), dtype=DTYPE, device=device)


def measure(x_TK: torch.Tensor, weights: list[torch.Tensor], blocks: LinearBlocks) -> tuple[float, float]:
    """(milliseconds of one product, relative error of the first)."""
    out_TN = torch.full((x_TK.shape[0], weights[0].shape[0]), float("nan"), dtype=DTYPE, device=x_TK.device)
    expected = torch.empty_like(out_TN)
    linear(x_TK, weights[0], out_TN, blocks=blocks)
    twin.linear(x_TK, weights[0], expected)
    error = relative_error(out_TN, expected)
    if not error <= MAX_ERROR:
        raise SystemExit(f"{blocks} at {x_TK.shape[0]} rows is wrong: relative error {error}")

    def run() -> None:
        for weight_NK in weights:
            linear(x_TK, weight_NK, out_TN, blocks=blocks)

    return median_ms(run) / len(weights), error


def library_ms(x_TK: torch.Tensor, weights: list[torch.Tensor]) -> float:
    def run() -> None:
        for weight_NK in weights:
            functional.linear(x_TK, weight_NK)

    return median_ms(run) / len(weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="sizes for the interpreter")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="numbers of rows")
    parser.add_argument("--variants", action="store_true", help="time other blocks as well")
    parser.add_argument("--processes", type=int, default=8, help="that compile")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes, rows = (TINY_SHAPES, TINY_ROWS) if arguments.tiny else (SHAPES, tuple(map(int, arguments.rows.split(","))))
    cases = [(site, num_rows) for site in shapes for num_rows in rows if site != "lm_head" or num_rows <= MAX_HEAD_ROWS]
    if device.type == "cuda" and not arguments.tiny:
        # A kernel does not depend on the number of rows: one job for each block of a shape.
        jobs = {
            (*shapes[site], blocks): (num_rows, *shapes[site], blocks)
            for site, num_rows in cases
            for blocks in candidates(num_rows, shapes[site][1], arguments.variants)
        }
        compile_apart(compile_one, list(jobs.values()), arguments.processes)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "interpreter"
    print(json.dumps({"device": name, "torch": torch.__version__, "triton": triton.__version__}), flush=True)
    for site, num_rows in cases:
        in_features, out_features = shapes[site]
        copies = 1 if arguments.tiny else max(1, CACHE_BYTES // (2 * in_features * out_features))
        x_TK, first, _ = tensors(num_rows, in_features, out_features, device)
        weights = [first, *(first.clone() for _ in range(copies - 1))]
        timed = [
            (blocks, *measure(x_TK, weights, blocks))
            for blocks in candidates(num_rows, out_features, arguments.variants)
        ]
        (blocks, ms, error), peer_ms = timed[0], library_ms(x_TK, weights)
        num_bytes = 2 * (num_rows * in_features + in_features * out_features + num_rows * out_features)
        result = {
            "site": site,
            "rows": num_rows,
            "ms": round(ms, 4),
            "cublas_ms": round(peer_ms, 4),
            "share": round(peer_ms / ms, 3),
            "bytes_per_s": round(num_bytes / ms * 1e3),
            "flop_per_s": round(2 * num_rows * in_features * out_features / ms * 1e3),
            "error": error,
            "blocks": asdict(blocks),
            "variants": [{"ms": round(other_ms, 4), **asdict(other)} for other, other_ms, _ in timed[1:]],
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
