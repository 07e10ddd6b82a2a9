"""The ceilings of this GPU: copies within it and to the host, and a model's matrix products by rows.

Prints one JSON object whose ``ceilings`` is what ``platform/loraplex/cost/ceilings.py`` holds for known GPUs; the whole
output is a file for ``loraplex bench engine --ceilings FILE``. Each product has a weight of its own, so that no cache
helps from one to the next.

    python kernels/benchmarks/ceilings.py --device cuda --model llama3-8b
"""

import argparse
import json
from dataclasses import asdict
from typing import Any

import torch
from loraplex.bench.measure_ceilings import copy_s, gemm_s, host_copy_s, measure_ceilings
from loraplex.core.ids import BaseModelId
from loraplex.core.model import ModelSpec
from loraplex.model_runner import load_model_spec

DECODE_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
NUM_LAYERS = 4
"""Enough for their weights to exceed every cache."""


def layer_shapes(spec: ModelSpec) -> list[tuple[int, int]]:
    """(in, out) of the fused projections of one layer."""
    d = spec.hidden_size
    return [
        (d, spec.q_size + 2 * spec.kv_size),
        (spec.q_size, d),
        (d, 2 * spec.intermediate_size),
        (spec.intermediate_size, d),
    ]


def decode_gemms(spec: ModelSpec, rows: int, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Milliseconds of the products of one decode step of the whole model."""
    layers_s = gemm_s(layer_shapes(spec) * NUM_LAYERS, rows, dtype, device) * spec.num_layers / NUM_LAYERS
    head_s = gemm_s([(spec.hidden_size, spec.vocab_size)], rows, dtype, device)
    return {"layers_ms": 1e3 * layers_s, "head_ms": 1e3 * head_s, "total_ms": 1e3 * (layers_s + head_s)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="llama3-8b", help="a shape of loraplex.model_runner.random_models")
    parser.add_argument("--rows", default=",".join(map(str, DECODE_ROWS)), help="of the decode steps")
    parser.add_argument("--prefill-rows", type=int, default=8192)
    parser.add_argument("--copy-mib", type=int, default=1024)
    options = parser.parse_args()
    device = torch.device(options.device)
    is_cuda = device.type == "cuda"
    dtype = torch.bfloat16 if is_cuda else torch.float32
    spec = load_model_spec(f"random:{options.model}", BaseModelId(options.model))
    rows = [int(count) for count in options.rows.split(",")]
    num_bytes = options.copy_mib << 20
    name = torch.cuda.get_device_name(device) if is_cuda else "cpu"
    # Fewer rows than the most of a decode step wait for memory: their rate says nothing about the matrix units.
    ceilings = measure_ceilings(
        name,
        device,
        dtype,
        shapes=layer_shapes(spec) * NUM_LAYERS,
        rows=(max(rows), options.prefill_rows),
        copy_bytes=num_bytes,
    )
    sizes = [size for size in (num_bytes // 16, num_bytes // 4, num_bytes) if size]
    report: dict[str, Any] = {
        "device": name,
        "torch": str(torch.__version__),
        "dtype": str(dtype).removeprefix("torch."),
        "model": options.model,
        "ceilings": asdict(ceilings),
        "copy_bytes_per_s": {size: 2 * size / copy_s(size, device) for size in sizes},
        "host_to_device_bytes_per_s": {size: size / host_copy_s(size, device, to_device=True) for size in sizes},
        "device_to_host_bytes_per_s": {size: size / host_copy_s(size, device, to_device=False) for size in sizes},
        "decode_gemms": {count: decode_gemms(spec, count, dtype, device) for count in rows},
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
