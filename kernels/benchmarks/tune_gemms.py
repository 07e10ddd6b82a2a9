"""Times cuBLASLt's algorithms for a model's GEMMs of few rows on the GPU at hand, and writes a table of those that beat
torch's choice: what ``loraplex_kernels.gpu.dense`` reads.

Rows are those of the graphs of decode steps and of short mixed steps. Each algorithm runs in a CUDA graph over several
copies of the weight, so that none comes out of the L2 cache; one enters the table when it takes at most ``--share`` of
torch's time in each of two measurements. One JSON object a line: the size, torch's time, the best, bytes and FLOPs a
second.

About a minute:

    python kernels/benchmarks/tune_gemms.py --out kernels/loraplex_kernels/gpu/gemms/h100_cublaslt_130100.json
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from graph_timing import median_ms, relative_error
from loraplex_kernels.gpu.cublaslt import CublasLt, library_version
from loraplex_kernels.gpu.dense import GemmTable, Size

SHAPES = {
    "llama3-8b": ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096), (4096, 128256)),
}
"""(K, N) of the projections and the head."""
ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, *range(128, 513, 32), 640, 768, 896, 1024, *range(1280, 2049, 256))
MOST_HEAD_ROWS = 512
COLD_BYTES = 128 << 20
MAX_ERROR = 1e-2


def tune(library: CublasLt, size: Size, weights: list[torch.Tensor], most: int, share: float) -> bytes | None:
    """Prints the size's line; None when torch's choice stands."""
    num_tokens, in_features, out_features = size
    x = torch.randn(num_tokens, in_features, device="cuda").to(torch.bfloat16)
    out = torch.empty(num_tokens, out_features, dtype=torch.bfloat16, device="cuda")

    def torchs(weight: torch.Tensor) -> None:
        torch.mm(x, weight.t(), out=out)

    def ms(run: Callable[[torch.Tensor], None]) -> float:
        def step() -> None:
            for weight in weights:
                run(weight)

        return median_ms(step, repeats=3, target_ms=2.0) / len(weights)

    torchs(weights[0])
    expected = out.clone()
    default = ms(torchs)
    timed: list[tuple[float, bytes]] = []
    for algorithm in library.algorithms(*size, torch.bfloat16, most):
        out.fill_(torch.nan)
        library.matmul(x, weights[0], out, algorithm)
        if relative_error(out, expected) > MAX_ERROR:
            raise SystemExit(f"wrong result: {size}")
        timed.append((ms(lambda weight, a=algorithm: library.matmul(x, weight, out, a)), algorithm))
    best, algorithm = min(timed)
    again = ms(lambda weight: library.matmul(x, weight, out, algorithm)), ms(torchs)
    taken = best <= share * default and again[0] <= share * again[1]
    print(
        json.dumps(
            {
                "size": size,
                "algorithms": len(timed),
                "torch_us": [round(default * 1e3, 2), round(again[1] * 1e3, 2)],
                "best_us": [round(best * 1e3, 2), round(again[0] * 1e3, 2)],
                "tb_per_s": round(weights[0].nbytes / best / 1e9, 3),
                "tflop_per_s": round(2 * num_tokens * in_features * out_features / best / 1e9, 1),
                "taken": taken,
            }
        ),
        flush=True,
    )
    return algorithm if taken else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(SHAPES), default="llama3-8b")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--most", type=int, default=16, help="algorithms to try for a size")
    parser.add_argument("--share", type=float, default=0.98)
    options = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda", torch.cuda.current_device())
    library = CublasLt(device)
    algorithms: dict[Size, bytes] = {}
    for in_features, out_features in SHAPES[options.model]:
        copies = max(2, -(-COLD_BYTES // (in_features * out_features * 2)))
        shape = (copies, out_features, in_features)
        weights = list(torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(std=0.02))
        for rows in options.rows:
            if out_features > 100_000 and rows > MOST_HEAD_ROWS:
                continue
            size = (rows, in_features, out_features)
            algorithm = tune(library, size, weights, options.most, options.share)
            if algorithm is not None:
                algorithms[size] = algorithm
        del weights
    options.out.parent.mkdir(parents=True, exist_ok=True)
    table = GemmTable(gpu=torch.cuda.get_device_name(device), cublaslt=library_version(), algorithms=algorithms)
    table.save(options.out)


if __name__ == "__main__":
    main()
