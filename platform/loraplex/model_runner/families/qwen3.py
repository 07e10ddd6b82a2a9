"""Qwen3: Llama with an RMSNorm over each query and key head, and a head dim of its own."""

from collections.abc import Mapping
from typing import Any

import torch
from loraplex_kernels import rms_norm

from loraplex.core.ids import BaseModelId
from loraplex.core.model import ModelSpec
from loraplex.model_runner.families.family import Family, read_common_spec, refuse_attention_bias, uniform_window
from loraplex.model_runner.weights import LayerWeights

_DEFAULT_HEAD_DIM = 128


def _read_spec(config: Mapping[str, Any], base_model_id: BaseModelId, *, source: str) -> ModelSpec:
    refuse_attention_bias(config, source)
    return read_common_spec(
        config,
        base_model_id,
        family="qwen3",
        source=source,
        head_dim=_DEFAULT_HEAD_DIM,
        qk_norm=True,
        sliding_window=uniform_window(config, source),
    )


def _norm_query_key(qkv_TC: torch.Tensor, weights: LayerWeights, spec: ModelSpec) -> None:
    """``qkv_TC``: (T, q + k + v). Queries and keys are normed head by head, in place."""
    assert weights.q_norm is not None
    assert weights.k_norm is not None
    num_tokens = qkv_TC.shape[0]
    q_TNH = qkv_TC[:, : spec.q_size].view(num_tokens, spec.num_heads, spec.head_dim)
    k_TGH = qkv_TC[:, spec.q_size : spec.q_size + spec.kv_size].view(num_tokens, spec.num_kv_heads, spec.head_dim)
    q_TNH.copy_(rms_norm(q_TNH, weights.q_norm, spec.rms_norm_eps))
    k_TGH.copy_(rms_norm(k_TGH, weights.k_norm, spec.rms_norm_eps))


QWEN3 = Family(name="qwen3", read_spec=_read_spec, prepare_query_key=_norm_query_key)
