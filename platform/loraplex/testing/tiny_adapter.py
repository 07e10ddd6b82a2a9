"""A tiny base model, as a spec without weights, and LoRA adapters of it as PEFT saves them: what intake accepts.

Used by tests and by the gateway's capacity measurement.
"""

import json

import numpy as np
from safetensors.numpy import save

from loraplex.core.ids import BaseModelId
from loraplex.core.model import ModelSpec

_HIDDEN_SIZE = 16


def tiny_model(base_model_id: BaseModelId, *, max_context_tokens: int) -> ModelSpec:
    return ModelSpec(
        base_model_id=base_model_id,
        family="llama",
        hidden_size=_HIDDEN_SIZE,
        intermediate_size=24,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        vocab_size=400,
        max_context_tokens=max_context_tokens,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
    )


def tiny_adapter(seed: int = 0, *, lora_rank: int = 4, hidden_size: int = _HIDDEN_SIZE) -> dict[str, bytes]:
    """File name -> content of an adapter on ``q_proj``. With another ``hidden_size`` it fits no ``tiny_model``."""
    rng = np.random.default_rng(seed)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{prefix}.lora_A.weight": rng.normal(size=(lora_rank, hidden_size)).astype(np.float32),
        f"{prefix}.lora_B.weight": rng.normal(size=(_HIDDEN_SIZE, lora_rank)).astype(np.float32),
    }
    config = {"peft_type": "LORA", "r": lora_rank, "lora_alpha": 8, "target_modules": ["q_proj"]}
    return {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": save(tensors)}
