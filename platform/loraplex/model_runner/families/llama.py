"""Llama 2 and 3 (with llama3 rotary scaling), SmolLM2: the decoder body as it is."""

from collections.abc import Mapping
from typing import Any

from loraplex.core.ids import BaseModelId
from loraplex.core.model import ModelSpec
from loraplex.model_runner.families.family import Family, read_common_spec, refuse_attention_bias


def _read_spec(config: Mapping[str, Any], base_model_id: BaseModelId, *, source: str) -> ModelSpec:
    refuse_attention_bias(config, source)
    return read_common_spec(config, base_model_id, family="llama", source=source)


LLAMA = Family(name="llama", read_spec=_read_spec)
