"""Mistral: Llama with a sliding window in every layer."""

from collections.abc import Mapping
from typing import Any

from loraplex.core.ids import BaseModelId
from loraplex.core.model import ModelSpec
from loraplex.model_runner.families.family import Family, read_common_spec, read_window

_DEFAULT_WINDOW = 4096
"""Of a config without the key; a null there means no window."""


def _read_spec(config: Mapping[str, Any], base_model_id: BaseModelId, *, source: str) -> ModelSpec:
    window = read_window(config, source, default=_DEFAULT_WINDOW)
    return read_common_spec(config, base_model_id, family="mistral", source=source, sliding_window=window)


MISTRAL = Family(name="mistral", read_spec=_read_spec)
