"""Strict intake: what is accepted becomes a complete manifest, every other config a BadAdapter that names the thing."""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from loraplex.core.errors import BadAdapter
from loraplex.core.ids import BaseModelId
from loraplex.core.model import LORA_MODULES
from loraplex.registry.config import RegistryConfig
from loraplex.registry.intake import check_adapter

from tests.registry.peft_files import (
    SALT,
    TINY,
    check,
    lora_config,
    lora_tensors,
    refusal,
    safetensors_bytes,
    with_header,
)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_good_adapter_becomes_a_manifest(tmp_path: Path, dtype: str) -> None:
    config = lora_config(target_modules=list(reversed(LORA_MODULES)))
    content = safetensors_bytes(lora_tensors(config, dtype=dtype))
    checked = check(tmp_path, config, content)
    manifest = checked.manifest
    assert [(block.layer, block.module) for block in manifest.blocks] == [(n, m) for n in (0, 1) for m in LORA_MODULES]
    assert {(block.lora_rank, block.scale) for block in manifest.blocks} == {(4, 2.0)}
    assert manifest.num_bytes == len(content)
    assert manifest.max_lora_rank == 4
    assert checked.content_sha256 == hashlib.sha256(content).hexdigest()


def test_patterns_and_rslora(tmp_path: Path) -> None:
    config = lora_config(rank_pattern={"v_proj": 2}, alpha_pattern={"^model.layers.1.self_attn.q_proj$": 4})
    blocks = check(tmp_path, config, lora_tensors(config)).manifest.blocks
    assert [(block.layer, block.module, block.lora_rank, block.scale) for block in blocks] == [
        (0, "q_proj", 4, 2.0),
        (0, "v_proj", 2, 4.0),
        (1, "q_proj", 4, 1.0),
        (1, "v_proj", 2, 4.0),
    ]
    config["use_rslora"] = True
    blocks = check(tmp_path, config, lora_tensors(config)).manifest.blocks
    assert [block.scale for block in blocks] == [4.0, 8 / math.sqrt(2), 2.0, 8 / math.sqrt(2)]


def test_only_some_layers(tmp_path: Path) -> None:
    config = lora_config(layers_to_transform=[1])
    tensors = lora_tensors(config)
    only_second = {name: entry for name, entry in tensors.items() if ".layers.1." in name}
    assert {block.layer for block in check(tmp_path, config, only_second).manifest.blocks} == {1}
    assert "not one that" in refusal(tmp_path, config, tensors)
    assert "has 2 layers" in refusal(tmp_path, lora_config(layers_to_transform=[2]), tensors)


def test_dotted_targets_as_peft_writes_them_for_all_linear(tmp_path: Path) -> None:
    tensors = lora_tensors(lora_config())
    both = [f"model.layers.{layer}.self_attn.{module}" for layer in (0, 1) for module in ("q_proj", "v_proj")]
    digest = check(tmp_path, lora_config(), tensors).manifest.digest
    assert check(tmp_path, lora_config(target_modules=both), tensors).manifest.digest == digest
    assert (
        check(tmp_path, lora_config(target_modules=["self_attn.q_proj", "v_proj"]), tensors).manifest.digest == digest
    )
    assert "not one that" in refusal(tmp_path, lora_config(target_modules=both[:3]), tensors)
    for target in ("attn.q_proj", "model.layers.7.self_attn.q_proj"):
        assert "match no module" in refusal(tmp_path, lora_config(target_modules=[target]), with_header(b"{}", b""))


def test_the_digest_is_of_content_meaning_base_and_tenant(tmp_path: Path) -> None:
    config = lora_config()
    tensors = lora_tensors(config)
    digest = check(tmp_path, config, tensors).manifest.digest
    same = lora_config(peft_version="0.20", lora_alpha=8.0, target_modules=["v_proj", "q_proj"], revision="main")
    assert check(tmp_path, same, tensors).manifest.digest == digest
    assert check(tmp_path, lora_config(lora_alpha=9), tensors).manifest.digest != digest
    assert check(tmp_path, config, lora_tensors(config, seed=1)).manifest.digest != digest
    assert check(tmp_path, config, tensors, salt="01" * 32).manifest.digest != digest
    other = replace(TINY, base_model_id=BaseModelId("tiny-chat"))
    assert check(tmp_path, config, tensors, spec=other).manifest.digest != digest


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"peft_type": ...}, "peft_type None"),
        ({"task_type": "SEQ_CLS"}, "task_type 'SEQ_CLS'"),
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias 'all'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"use_qalora": True}, "QALoRA"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"exclude_modules": ["q_proj"]}, "exclude_modules"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"use_brand_new_lora": True}, "'use_brand_new_lora' is not known"),
        ({"target_modules": "all-linear"}, "'all-linear' is a pattern"),
        ({"target_modules": ".*_proj"}, "'.*_proj' is a pattern"),
        ({"target_modules": ["q_proj", "lm_head"]}, "'lm_head' is not supported"),
        ({"target_modules": []}, "target_modules must be a list"),
        ({"target_modules": None}, "target_modules must be a list"),
        ({"r": 10_000}, "r is 10000; ranks from 1 to 256"),
        ({"r": 0}, "r is 0"),
        ({"r": True}, "r must be an integer"),
        ({"r": "8"}, "r must be an integer"),
        ({"r": ...}, "r must be an integer"),
        ({"rank_pattern": {"q_proj": 257}}, "rank_pattern['q_proj'] is 257"),
        ({"rank_pattern": {".*q_proj": 8}}, "regular expression"),
        ({"rank_pattern": {"(a+)+b": 8}}, "regular expression"),
        ({"rank_pattern": [1]}, "rank_pattern must be an object"),
        ({"lora_alpha": 0}, "lora_alpha must be finite and greater than 0"),
        ({"lora_alpha": -1}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"lora_alpha": "16"}, "lora_alpha must be a number"),
        ({"lora_alpha": 1e9}, "scale"),
        ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern['q_proj']"),
        ({"use_rslora": "yes"}, "use_rslora must be true or false"),
        ({"layers_to_transform": [-1]}, "layers_to_transform"),
        ({"layers_pattern": "h", "layers_to_transform": [0]}, "layers_pattern"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path"),
    ],
)
def test_unsupported_options_are_named(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    assert named in refusal(tmp_path, lora_config(**changes), lora_tensors(lora_config()))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[1]", "not a JSON object"),
        (b'{"r": NaN}', "NaN is not a JSON number"),
        (b'{"lora_alpha": 1e400}', "peft_type"),
        (b'{"r": 1, "r": 2}', "'r' appears twice"),
        (b"[" * 60_000, "nested too deeply"),
        (b'{"x": ' + b"9" * 5000 + b"}", "not JSON"),
        (b" " * 70_000, "more than the allowed 65536 bytes"),
    ],
)
def test_broken_config_files(tmp_path: Path, config: bytes, named: str) -> None:
    assert named in refusal(tmp_path, config, lora_tensors(lora_config()))


def test_missing_files(tmp_path: Path) -> None:
    directory = tmp_path / "adapter"
    check(directory, lora_config(), lora_tensors(lora_config()))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (directory / name).unlink()
        with pytest.raises(BadAdapter, match=rf"{name}: the file is missing"):
            check_adapter(directory, bases={TINY.base_model_id: TINY}, digest_salt=SALT, config=RegistryConfig())


def test_wrong_base_is_told_by_shape_and_by_name(tmp_path: Path) -> None:
    wide = replace(TINY, hidden_size=32, head_dim=8)
    message = refusal(tmp_path, lora_config(), lora_tensors(lora_config(), spec=wide))
    assert "has shape [4, 32], but base model 'tiny' with rank 4 needs [4, 16]: wrong base model" in message
    deep = replace(TINY, num_layers=3)
    assert "layers.2.self_attn" in refusal(tmp_path, lora_config(), lora_tensors(lora_config(), spec=deep))

    (tmp_path / "adapter_config.json").write_text(json.dumps(lora_config(base_model_name_or_path="org/Tiny-B")))
    (tmp_path / "adapter_model.safetensors").write_bytes(safetensors_bytes(lora_tensors(lora_config())))
    bases = {BaseModelId(name): replace(TINY, base_model_id=BaseModelId(name)) for name in ("tiny-a", "tiny-b")}
    checked = check_adapter(tmp_path, bases=bases, digest_salt=SALT, config=RegistryConfig())
    assert checked.manifest.base_model_id == "tiny-b"
    with pytest.raises(BadAdapter, match="no base model is served"):
        check_adapter(tmp_path, bases={}, digest_salt=SALT, config=RegistryConfig())
    bases.pop(BaseModelId("tiny-b"))
    bases[BaseModelId("tiny-c")] = replace(TINY, base_model_id=BaseModelId("tiny-c"))
    with pytest.raises(BadAdapter, match="'org/Tiny-B' names none of the served base models: tiny-a, tiny-c"):
        check_adapter(tmp_path, bases=bases, digest_salt=SALT, config=RegistryConfig())
