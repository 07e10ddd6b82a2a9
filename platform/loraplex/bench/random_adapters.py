"""Adapters of random weights on all seven projections, written as PEFT would, for benchmarks.

Knows the tensor names of PEFT and nothing of engines. Called by ``engine_bench``.
"""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import save_file

from loraplex.core.adapter import AdapterBlock, AdapterManifest
from loraplex.core.ids import Digest
from loraplex.core.model import LORA_MODULES, ModelSpec

MAX_FILES = 4
"""Adapters beyond this many share files: their digests, and so their pages and loads, stay distinct."""


def write_random_adapters(
    directory: Path, model: ModelSpec, *, count: int, lora_rank: int, seed: int
) -> dict[Digest, tuple[AdapterManifest, str]]:
    """``count`` adapters in bf16: digest -> (manifest, path of the safetensors file)."""
    paths = [
        _write_adapter(directory / f"adapter-{index}.safetensors", model, lora_rank=lora_rank, seed=seed + index)
        for index in range(min(count, MAX_FILES))
    ]
    blocks = tuple(
        AdapterBlock(layer=layer, module=module, lora_rank=lora_rank, scale=1.0)
        for layer in range(model.num_layers)
        for module in LORA_MODULES
    )
    adapters: dict[Digest, tuple[AdapterManifest, str]] = {}
    for index in range(count):
        path = paths[index % len(paths)]
        digest = Digest(hashlib.sha256(f"random adapter {seed} {index}".encode()).hexdigest())
        manifest = AdapterManifest(
            digest=digest, base_model_id=model.base_model_id, blocks=blocks, num_bytes=path.stat().st_size
        )
        adapters[digest] = (manifest, str(path))
    return adapters


def _write_adapter(path: Path, model: ModelSpec, *, lora_rank: int, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(model.num_layers):
        for module in LORA_MODULES:
            num_in, num_out = model.projection_shape(module)
            block = "self_attn" if module in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            name = f"base_model.model.model.layers.{layer}.{block}.{module}"
            for part, shape in (("lora_A", (lora_rank, num_in)), ("lora_B", (num_out, lora_rank))):
                weight = torch.empty(shape, dtype=torch.float32, device="cpu")
                weight.normal_(std=0.01, generator=generator)
                tensors[f"{name}.{part}.weight"] = weight.to(torch.bfloat16)
    save_file(tensors, path)
    return path
