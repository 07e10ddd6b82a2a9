"""Made-up adapters as PEFT directories, for benchmarks that bring adapters in through the registry.

Called by ``loraplex bench serve`` and ``against_transformers``. (``session`` draws its adapters straight into host
memory.)
"""

import json
from pathlib import Path

import torch

from loraplex.bench.staging import write_random_adapter
from loraplex.core.adapter import AdapterManifest
from loraplex.core.model import ModelSpec


def write_random_peft(
    directory: Path, manifest: AdapterManifest, model: ModelSpec, *, seed: int, scale: int = 1
) -> None:
    """Writes config and bf16 weights of one adapter into ``directory``, which is made. All its blocks have one rank and
    this ``scale``, whatever the manifest says."""
    (lora_rank,) = {block.lora_rank for block in manifest.blocks}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": model.base_model_id,
        "r": lora_rank,
        "lora_alpha": lora_rank * scale,
        "target_modules": sorted({block.module for block in manifest.blocks}),
    }
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    write_random_adapter(manifest, model, directory / "adapter_model.safetensors", torch.bfloat16, seed=seed)
