"""Qwen2 and Qwen2.5: Llama with a bias on q, k and v."""

from collections.abc import Mapping
from typing import Any

from loraplex.core.ids import BaseModelId
from loraplex.core.model import ModelSpec
from loraplex.model_runner.families.family import Family, read_common_spec, uniform_window


def _read_spec(config: Mapping[str, Any], base_model_id: BaseModelId, *, source: str) -> ModelSpec:
    window = uniform_window(config, source)
    return read_common_spec(config, base_model_id, family="qwen2", source=source, qkv_bias=True, sliding_window=window)


QWEN2 = Family(name="qwen2", read_spec=_read_spec)
