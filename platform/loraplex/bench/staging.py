"""How fast an adapter file becomes a blob in host memory: ``python -m loraplex.bench.staging``.

Times the host tier alone, page cache warm: reading, casting, transposing and checking, without and with the growth of
the pool, on ``--threads`` at once. ``--pin`` needs a CUDA device.
"""

import argparse
import json
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file

from loraplex.bench.random_adapters import random_manifests
from loraplex.core.adapter import AdapterManifest
from loraplex.core.ids import BaseModelId, Digest
from loraplex.core.model import ModelSpec
from loraplex.cost.memory import PAGE_TOKENS
from loraplex.model_runner.build import load_model_spec
from loraplex.model_runner.host_adapters import HostAdapters
from loraplex.model_runner.shard import Shard


def write_random_adapter(
    manifest: AdapterManifest, model: ModelSpec, path: Path, dtype: torch.dtype, *, seed: int = 0
) -> None:
    """As PEFT saves it; elements of standard deviation 0.01."""
    tensors = {}
    generator = torch.Generator().manual_seed(seed)
    for block in manifest.blocks:
        in_features, out_features = model.projection_shape(block.module)
        parent = "mlp" if block.module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
        prefix = f"base_model.model.model.layers.{block.layer}.{parent}.{block.module}"
        for side, shape in (("A", (block.lora_rank, in_features)), ("B", (out_features, block.lora_rank))):
            tensors[f"{prefix}.lora_{side}.weight"] = (
                torch.empty(shape).normal_(std=0.01, generator=generator).to(dtype)
            )
    save_file(tensors, path)


def measure_staging(
    model: ModelSpec,
    path: Path,
    manifest: AdapterManifest,
    *,
    dtype: torch.dtype,
    pin: bool,
    threads: int,
    repeats: int,
) -> dict[str, float]:
    """Seconds and MB (1e6) of the file per second."""
    page_bytes = PAGE_TOKENS * model.kv_elements_per_token * dtype.itemsize
    host = HostAdapters(Shard.whole(model), page_bytes=page_bytes, dtype=dtype, pin=pin)
    host.layout(manifest)
    copies = [
        AdapterManifest(
            digest=Digest(f"{index:064x}"),
            base_model_id=manifest.base_model_id,
            blocks=manifest.blocks,
            num_bytes=manifest.num_bytes,
        )
        for index in range(threads)
    ]

    def stage(copy: AdapterManifest) -> None:
        host.stage(copy, str(path))

    times: list[float] = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats + 1):
            started_s = time.perf_counter()
            list(pool.map(stage, copies))
            times.append(time.perf_counter() - started_s)
            for copy in copies:
                host.unstage(copy.digest)
    host.close()
    num_bytes = path.stat().st_size
    median_s = statistics.median(times[1:])
    return {
        "file_bytes": num_bytes,
        "threads": threads,
        "first_s": times[0],
        "median_s": median_s,
        "mb_per_s": threads * num_bytes / median_s / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds and MB/s from a safetensors file to host memory.")
    parser.add_argument("--model", default="random:llama3-8b")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--file-dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=1, help="files at once")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pin", action="store_true", help="pinned memory")
    arguments = parser.parse_args()
    model = load_model_spec(arguments.model, BaseModelId("bench"))
    (manifest,) = random_manifests(model, count=1, lora_ranks=(arguments.rank,))
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[arguments.file_dtype]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "adapter.safetensors"
        write_random_adapter(manifest, model, path, dtype)
        result = measure_staging(
            model,
            path,
            manifest,
            dtype=torch.bfloat16,
            pin=arguments.pin,
            threads=arguments.threads,
            repeats=arguments.repeats,
        )
    print(json.dumps({key: round(value, 4) for key, value in result.items()}))


if __name__ == "__main__":
    main()
