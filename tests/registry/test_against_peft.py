"""Ranks and scales that intake resolves are those that peft applies, for adapters that peft itself saved."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loraplex.core.errors import BadAdapter
from loraplex.core.model import LORA_MODULES
from loraplex.registry.config import RegistryConfig
from loraplex.registry.intake import CheckedAdapter, check_adapter
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from tests.registry.peft_files import SALT, TINY

SPEC = replace(TINY, hidden_size=32, intermediate_size=48, head_dim=8, vocab_size=64)
ALL = list(LORA_MODULES)


Held = dict[tuple[int, str], tuple[int, float]]


def _save(directory: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Held:
    """Saves a fresh adapter; returns what peft holds per (layer, module): rank and scale."""
    base = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
        )
    )
    model: Any = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, **options)).to(dtype)
    model.save_pretrained(directory)
    held: Held = {}
    for name, module in model.named_modules():
        if "default" in (module.scaling if isinstance(getattr(module, "scaling", None), dict) else ()):
            parts = name.split(".")
            held[int(parts[parts.index("layers") + 1]), parts[-1]] = (module.r["default"], module.scaling["default"])
    return held


def _check(directory: Path) -> CheckedAdapter:
    return check_adapter(directory, bases={SPEC.base_model_id: SPEC}, digest_salt=SALT, config=RegistryConfig())


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ALL},
        {"target_modules": ["q_proj"], "use_rslora": True, "dtype": torch.bfloat16},
        {"target_modules": "all-linear"},
        {"target_modules": ALL, "layers_to_transform": [1]},
        {
            "target_modules": ALL,
            "rank_pattern": {
                "q_proj": 4,
                "model.layers.1.mlp.up_proj": 3,
                "layers.0.self_attn.k_proj": 2,
                "^model.layers.0.self_attn.v_proj": 5,
                "^layers.0.self_attn.o_proj": 7,
            },
            "alpha_pattern": {"self_attn.q_proj": 3, r"mlp\.down_proj$": 7.5},
        },
    ],
    ids=["all", "rslora-bf16", "all-linear", "one-layer", "patterns"],
)
def test_saved_by_peft(tmp_path: Path, options: dict[str, Any]) -> None:
    held = _save(tmp_path, **options)
    blocks = _check(tmp_path).manifest.blocks
    assert {(block.layer, block.module): (block.lora_rank, block.scale) for block in blocks} == held


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "pissa"),
    ],
)
def test_unsupported_kinds_that_peft_saves(tmp_path: Path, options: dict[str, Any], named: str) -> None:
    _save(tmp_path, target_modules=["q_proj", "up_proj"], **options)
    with pytest.raises(BadAdapter, match=named):
        _check(tmp_path)
