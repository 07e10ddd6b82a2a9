"""What a model family may differ in, and the reading of config keys that all of them share.

A family turns a Hugging Face config into a ModelSpec and may touch queries and keys before the rotation; the decoder
body is the same for all. Called by the family files and, through the table, by checkpoints and executor.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from loraplex.core.errors import BadConfig
from loraplex.core.ids import BaseModelId
from loraplex.core.model import ModelSpec, RopeScaling
from loraplex.model_runner.weights import LayerWeights

PrepareQueryKey = Callable[[torch.Tensor, LayerWeights, ModelSpec], None]
"""Changes the fused (T, q + k + v) columns in place, after the projection and before the rotation."""


class ReadSpec(Protocol):
    def __call__(self, config: Mapping[str, Any], base_model_id: BaseModelId, *, source: str) -> ModelSpec:
        """``source`` names the file in a BadConfig."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    name: str
    """``model_type`` in config.json and ``ModelSpec.family``."""
    read_spec: ReadSpec
    prepare_query_key: PrepareQueryKey | None = None


def read_common_spec(
    config: Mapping[str, Any],
    base_model_id: BaseModelId,
    *,
    family: str,
    source: str,
    head_dim: int | None = None,
    sliding_window: int | None = None,
    qkv_bias: bool = False,
    qk_norm: bool = False,
) -> ModelSpec:
    """The keys that mean the same everywhere. ``head_dim``: default when the config has none (else hidden / heads).

    Raises BadConfig for a missing key, a wrong type, or an option that the decoder body does not know.
    """
    if config.get("hidden_act", "silu") != "silu":
        raise BadConfig(f"{source}: hidden_act {config['hidden_act']!r} is not supported", param="hidden_act")
    if config.get("mlp_bias"):
        raise BadConfig(f"{source}: mlp_bias is not supported", param="mlp_bias")
    hidden_size = _integer(config, "hidden_size", source)
    num_heads = _integer(config, "num_attention_heads", source)
    num_kv_heads = _integer(config, "num_key_value_heads", source, default=num_heads)
    if num_heads % num_kv_heads:
        raise BadConfig(f"{source}: {num_heads} heads do not share {num_kv_heads} key heads evenly")
    theta, scaling = _rope(config, source)
    eos = config.get("eos_token_id")
    return ModelSpec(
        base_model_id=base_model_id,
        family=family,
        hidden_size=hidden_size,
        intermediate_size=_integer(config, "intermediate_size", source),
        num_layers=_integer(config, "num_hidden_layers", source),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_integer(config, "head_dim", source, default=head_dim or hidden_size // num_heads),
        vocab_size=_integer(config, "vocab_size", source),
        max_context_tokens=_integer(config, "max_position_embeddings", source),
        rms_norm_eps=_number(config, "rms_norm_eps", source, default=1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        sliding_window=sliding_window,
        bos_token_id=config.get("bos_token_id"),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),),
    )


def refuse_attention_bias(config: Mapping[str, Any], source: str) -> None:
    """Families whose optional attention_bias also puts a bias on o_proj, which the decoder body does not have."""
    if config.get("attention_bias"):
        raise BadConfig(f"{source}: attention_bias is not supported", param="attention_bias")


def uniform_window(config: Mapping[str, Any], source: str) -> int | None:
    """Qwen's switchable window: None, or the window when it holds in every layer. BadConfig for a mixture."""
    if not config.get("use_sliding_window"):
        return None
    num_layers = _integer(config, "num_hidden_layers", source)
    first_windowed = _integer(config, "max_window_layers", source, default=28, minimum=0)
    if first_windowed >= num_layers:
        return None
    if first_windowed > 0:
        raise BadConfig(f"{source}: a sliding window in some layers only is not supported", param="max_window_layers")
    return _integer(config, "sliding_window", source, default=4096)


def _rope(config: Mapping[str, Any], source: str) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from ``rope_parameters`` (new files) or ``rope_theta`` and ``rope_scaling`` (older ones)."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(parameters, Mapping):
        raise BadConfig(f"{source}: rope_parameters is not an object", param="rope_parameters")
    theta = _number({**config, **parameters}, "rope_theta", source, default=10000.0)
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if rope_type == "default":
        return theta, None
    if rope_type != "llama3":
        raise BadConfig(f"{source}: rope_type {rope_type!r} is not supported", param="rope_type")
    return theta, RopeScaling(
        factor=_number(parameters, "factor", source),
        low_freq_factor=_number(parameters, "low_freq_factor", source),
        high_freq_factor=_number(parameters, "high_freq_factor", source),
        original_max_positions=_integer(parameters, "original_max_position_embeddings", source),
    )


def read_window(config: Mapping[str, Any], source: str, *, default: int) -> int | None:
    """``sliding_window``: null means none, a missing key means ``default``."""
    if config.get("sliding_window", default) is None:
        return None
    return _integer(config, "sliding_window", source, default=default)


def _integer(config: Mapping[str, Any], key: str, source: str, *, default: int | None = None, minimum: int = 1) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise BadConfig(f"{source}: {key} is {value!r}, a whole number from {minimum} is expected", param=key)
    return value


def _number(config: Mapping[str, Any], key: str, source: str, *, default: float | None = None) -> float:
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise BadConfig(f"{source}: {key} is {value!r}, a number is expected", param=key)
    return float(value)
