"""The operations between GEMMs on one GPU: decode and prefill sizes of Llama-3.1-8B's shape, over launch parameters.

Every case is checked against its twin, then timed as a CUDA graph over several copies of its tensors, more than the L2
cache holds; medians. The floor is the time in which ``--bandwidth`` moves the bytes that the operation has to read and
write once. Prefill LoRA runs one adapter over every token (``1``) or 32 in turn. One JSON object a line: each case with
its best launch parameters and all others (``default``: what ``tuning`` chooses).

    python kernels/benchmarks/bench_epilogues.py                                  # under a minute
    TRITON_INTERPRET=1 python kernels/benchmarks/bench_epilogues.py --tiny        # any machine: does it run
"""

import argparse
import json
from collections.abc import Iterator

import torch
import triton
from epilogue_cases import Bench, Model, elementwise, prefill_lora
from graph_timing import compile_apart, median_ms, relative_error
from loraplex_kernels import KvLayout
from loraplex_kernels.gpu.lora_random import LayerShape

MAX_ERROR = 1e-2
CACHE_BYTES = 128 << 20

CASES = ("decode-1", "decode-32", "decode-256", "prefill-8192", "lora-8192-1-16", "lora-8192-32-16", "lora-8192-1-64")
TINY_CASES = ("decode-2", "lora-70-2-16", "lora-5-1-64")


def benches(model: Model, case: str) -> Iterator[tuple[str, Bench]]:
    kind, *sizes = case.split("-")
    numbers = [int(size) for size in sizes]
    return prefill_lora(model, *numbers) if kind == "lora" else elementwise(model, *numbers)


def measure(model: Model, case: str, bandwidth: float, max_configs: int | None) -> None:
    on_gpu = model.device.type == "cuda"
    for name, bench in benches(model, case):
        inputs = bench.make()
        expected = bench.twin(tuple(tensor.clone() for tensor in inputs))
        actual = bench.run(tuple(tensor.clone() for tensor in inputs), None)
        if expected.dim() == 3:  # partial sums over splits
            expected, actual = expected.sum(0), actual.sum(0)
        error = relative_error(actual, expected)
        if not error <= MAX_ERROR:
            raise SystemExit(f"{case} {name}: relative error {error} against the twin")
        del actual, expected
        copies = [inputs]
        if on_gpu:
            own = sum(tensor.nbytes for tensor in inputs)
            copies += [bench.make() for _ in range(min(31, CACHE_BYTES // own))]

        def step(config: object, bench: Bench = bench, copies: list[tuple[torch.Tensor, ...]] = copies) -> None:
            for tensors in copies:
                bench.run(tensors, config)

        times = {
            key: median_ms(lambda config=config, step=step: step(config), repeats=5) * 1e3 / len(copies)
            for key, config in list(bench.configs.items())[:max_configs]
        }
        best = min(times, key=lambda key: times[key])
        floor_us = bench.num_bytes / bandwidth * 1e6
        result = {
            "case": case,
            "operation": name,
            "error": round(error, 6),
            "bytes": bench.num_bytes,
            "floor_us": round(floor_us, 2),
            "best": best,
            "best_us": round(times[best], 2),
            "bytes_per_s": round(bench.num_bytes / times[best] * 1e6),
            "floor_ratio": round(floor_us / times[best], 3),
            "us": {key: round(value, 2) for key, value in times.items()},
        }
        print(json.dumps(result), flush=True)


def build(case: str) -> None:
    """Compiles the kernels of a case: one launch of each of its launch parameters."""
    for _, bench in benches(make_model(False), case):
        inputs = bench.make()
        for config in bench.configs.values():
            bench.run(inputs, config)
    torch.cuda.synchronize()


def make_model(tiny: bool) -> Model:
    if tiny:
        return Model(
            shape=LayerShape(hidden=64, q=64, kv=32, intermediate=96),
            layout=KvLayout(num_layers=1, num_kv_heads=2, head_dim=16, page_size=16),
            dtype=torch.float32,
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
            vocabulary=50,
        )
    return Model(
        shape=LayerShape(hidden=4096, q=4096, kv=1024, intermediate=14336),
        layout=KvLayout(num_layers=1, num_kv_heads=8, head_dim=128, page_size=16),
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
        vocabulary=32768,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES), help="decode-T, prefill-T or lora-T-ADAPTERS-RANK")
    parser.add_argument("--bandwidth", type=float, default=3.02e12, help="bytes/s of a large copy on this GPU")
    parser.add_argument("--processes", type=int, default=7, help="that compile ahead; 0: none")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for any machine")
    options = parser.parse_args()
    cases = list(TINY_CASES) if options.tiny else options.cases.split(",")
    model = make_model(options.tiny)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(json.dumps({"device": name, "torch": torch.__version__, "triton": triton.__version__}), flush=True)
    if options.processes and not options.tiny:
        compile_apart(build, cases, options.processes)
    for case in cases:
        measure(model, case, options.bandwidth, 2 if options.tiny else None)


if __name__ == "__main__":
    main()
