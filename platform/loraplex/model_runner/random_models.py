"""Models of real shapes with random weights, ``random:NAME``: for benchmarks and tests that need no download.

Owns the table of shapes and the drawing; the same name gives the same weights on the same kind of device.
Called by ``build``.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from loraplex.core.errors import BadConfig
from loraplex.core.ids import BaseModelId
from loraplex.core.model import ModelSpec
from loraplex.model_runner.families import family_by_name
from loraplex.model_runner.weights import tensor_shapes

_LLAMA31_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
}
_TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "llama3-8b": {
        **_LLAMA3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_parameters": _LLAMA31_ROPE,
    },
    "llama3-70b": {
        **_LLAMA3,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "rope_parameters": _LLAMA31_ROPE,
    },
    "llama3-1b": {
        **_LLAMA3,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "rope_parameters": {**_LLAMA31_ROPE, "factor": 32.0},
        "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 151643,
        "eos_token_id": [151645, 151643],
    },
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 151643,
        "eos_token_id": [151645, 151643],
    },
    "mistral-7b": {
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "tiny-llama": {**_TINY, "model_type": "llama", "rope_parameters": _LLAMA31_ROPE},
    "tiny-mistral": {**_TINY, "model_type": "mistral", "sliding_window": 24},
    "tiny-qwen2": {**_TINY, "model_type": "qwen2", "tie_word_embeddings": True},
    "tiny-qwen3": {**_TINY, "model_type": "qwen3", "head_dim": 32},
}


def random_config(name: str) -> Mapping[str, Any]:
    """The ``config.json`` of the shape called ``name`` (without ``random:``). BadConfig listing the known names."""
    config = _CONFIGS.get(name)
    if config is None:
        raise BadConfig(f"random:{name} is not known (known: {', '.join(_CONFIGS)})", param="model")
    return config


def random_spec(name: str, base_model_id: BaseModelId) -> ModelSpec:
    """The shape called ``name`` (without ``random:``). BadConfig listing the known names."""
    config = random_config(name)
    family = family_by_name(config["model_type"], source=f"random:{name}")
    return family.read_spec(config, base_model_id, source=f"random:{name}")


def random_tensors(
    name: str, spec: ModelSpec, *, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) drawn on ``device`` one at a time, scaled so that activations keep their size layer by layer."""
    generator = torch.Generator(device=device)
    generator.manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big"))
    for tensor_name, shape in tensor_shapes(spec).items():
        tensor = torch.empty(shape, dtype=dtype, device=device)
        if tensor_name.endswith("norm.weight"):
            tensor.fill_(1.0)
        else:
            std = 1.0 if tensor_name == "model.embed_tokens.weight" and not spec.tie_embeddings else shape[-1] ** -0.5
            tensor.normal_(0.0, std, generator=generator)
        yield tensor_name, tensor
