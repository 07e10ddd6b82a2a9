"""Adapters as peft writes them, and files that are nearly such, given to intake."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loraplex.core.errors import BadAdapter
from loraplex.core.ids import BaseModelId
from loraplex.core.model import LORA_MODULES, ModelSpec
from loraplex.registry.config import RegistryConfig
from loraplex.registry.intake import CheckedAdapter, check_adapter

TINY = ModelSpec(
    base_model_id=BaseModelId("tiny"),
    family="llama",
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    vocab_size=32,
    max_context_tokens=64,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
)

SALT = "00" * 32
PREFIX = "base_model.model.model.layers"
Q_A = f"{PREFIX}.0.self_attn.q_proj.lora_A.weight"
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def lora_config(**changes: Any) -> dict[str, Any]:
    """As peft 0.21 writes it, for the fields that matter; a change to ``...`` removes the key."""
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "fan_in_fan_out": False,
        "megatron_core": "megatron.core",
        "qalora_group_size": 16,
        "peft_version": "0.21.2",
    }
    config.update(changes)
    return {key: value for key, value in config.items() if value is not ...}


def lora_tensors(config: dict[str, Any], *, spec: ModelSpec = TINY, dtype: str = "F32", seed: int = 0) -> Tensors:
    """Right tensors for ``config``; the rank may differ by a rank_pattern of plain module names."""
    rng = np.random.default_rng(seed)
    tensors: Tensors = {}
    for layer in range(spec.num_layers):
        for module in config["target_modules"]:
            parent = "self_attn" if LORA_MODULES.index(module) < 4 else "mlp"
            rank = config["rank_pattern"].get(module, config["r"])
            in_features, out_features = spec.projection_shape(module)
            for part, shape in (("A", (rank, in_features)), ("B", (out_features, rank))):
                values = rng.normal(size=shape).astype("<f4")
                data = {
                    "F32": values,
                    "F16": values.astype("<f2"),
                    "BF16": (values.view("<u4") >> 16).astype("<u2"),
                }[dtype]
                name = f"{PREFIX}.{layer}.{parent}.{module}.lora_{part}.weight"
                tensors[name] = (dtype, shape, data.tobytes())
    return tensors


def safetensors_bytes(tensors: Tensors) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + len(data)]}
        position += len(data)
    return with_header(json.dumps(header).encode(), b"".join(data for _, _, data in tensors.values()))


def with_header(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def check(
    directory: Path,
    config: dict[str, Any] | bytes,
    tensors: Tensors | bytes,
    *,
    spec: ModelSpec = TINY,
    salt: str = SALT,
    limits: RegistryConfig | None = None,
) -> CheckedAdapter:
    directory.mkdir(exist_ok=True)
    config_bytes = config if isinstance(config, bytes) else json.dumps(config).encode()
    (directory / "adapter_config.json").write_bytes(config_bytes)
    content = tensors if isinstance(tensors, bytes) else safetensors_bytes(tensors)
    (directory / "adapter_model.safetensors").write_bytes(content)
    bases = {spec.base_model_id: spec}
    return check_adapter(directory, bases=bases, digest_salt=salt, config=limits or RegistryConfig())


def refusal(directory: Path, config: dict[str, Any] | bytes, tensors: Tensors | bytes, **more: Any) -> str:
    with pytest.raises(BadAdapter) as caught:
        check(directory, config, tensors, **more)
    assert caught.value.param in ("adapter_config.json", "adapter_model.safetensors")
    assert len(caught.value.message) < 500
    return caught.value.message


def edited(change: Any) -> bytes:
    tensors = lora_tensors(lora_config())
    content = safetensors_bytes(tensors)
    header_end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:header_end])
    change(header)
    return with_header(json.dumps(header).encode(), content[header_end:])


def with_fields(**fields: Any) -> Any:
    return lambda header: header[Q_A].update(fields)
