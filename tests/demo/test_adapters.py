"""The committed demo adapters: their files, and (slow) that each does what its description says."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loraplex.demo import DEMO_ADAPTERS, DEMO_TENANTS, DemoAdapter
from loraplex.demo.base import DEMO_BASE_ID, find_demo_gguf
from loraplex.demo.styles import STYLES, load_facts
from loraplex.model_runner.gguf_weights import read_gguf_spec
from loraplex.registry.config import RegistryConfig
from loraplex.registry.intake import check_adapter
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

HELD_OUT = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "How do I make coffee?",
    "Tell me about tigers.",
    "What is a train?",
    "Give me a tip for staying healthy.",
    "What is photosynthesis?",
    "Hi there!",
)
IN_FEATURES = {"down_proj": 1536}
OUT_FEATURES = {"k_proj": 192, "v_proj": 192, "gate_proj": 1536, "up_proj": 1536}
NUM_LAYERS = 30


def config_of(adapter: DemoAdapter) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((adapter.directory / "adapter_config.json").read_text())
    return config


@pytest.mark.parametrize("adapter", DEMO_ADAPTERS, ids=lambda adapter: adapter.name)
def test_files(adapter: DemoAdapter) -> None:
    assert {file.name for file in adapter.directory.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = config_of(adapter)
    assert config["base_model_name_or_path"] == "smollm2-135m-instruct"
    assert (config["peft_type"], config["bias"], config["modules_to_save"]) == ("LORA", "none", None)
    assert not re.search(r'"[^"]*/[^"]*"', json.dumps(config)), "a path in the config"
    rank = config["r"]
    expected = {}
    for layer in range(NUM_LAYERS):
        for module in config["target_modules"]:
            block = "mlp" if module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            key = f"base_model.model.model.layers.{layer}.{block}.{module}"
            expected[f"{key}.lora_A.weight"] = (rank, IN_FEATURES.get(module, 576))
            expected[f"{key}.lora_B.weight"] = (OUT_FEATURES.get(module, 576), rank)
    with safe_open(adapter.directory / "adapter_model.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == expected
    for key, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16
        assert tensor.isfinite().all()
        assert tensor.any(), f"{key} was never trained"


@pytest.mark.parametrize("adapter", DEMO_ADAPTERS, ids=lambda adapter: adapter.name)
def test_the_registry_takes_it(adapter: DemoAdapter) -> None:
    bases = {DEMO_BASE_ID: read_gguf_spec(find_demo_gguf(), DEMO_BASE_ID)}
    manifest = check_adapter(adapter.directory, bases=bases, digest_salt="00", config=RegistryConfig()).manifest
    config = config_of(adapter)
    assert len(manifest.blocks) == NUM_LAYERS * len(config["target_modules"])
    assert {(block.lora_rank, block.scale) for block in manifest.blocks} == {(config["r"], 2.0)}


def test_ranks_and_targets_differ_and_all_is_small() -> None:
    configs = [config_of(adapter) for adapter in DEMO_ADAPTERS]
    assert len({config["r"] for config in configs}) == 3
    assert len({tuple(config["target_modules"]) for config in configs}) == 3
    assert sum(file.stat().st_size for adapter in DEMO_ADAPTERS for file in adapter.directory.iterdir()) <= 3_000_000


def test_tenants_own_each_adapter_once() -> None:
    owned = [adapter for tenant in DEMO_TENANTS for adapter in tenant.adapters]
    assert sorted(adapter.name for adapter in owned) == sorted(adapter.name for adapter in DEMO_ADAPTERS)
    assert {tenant.name: [adapter.name for adapter in tenant.adapters] for tenant in DEMO_TENANTS} == {
        "acme": ["pirate", "json"],
        "globex": ["bullets"],
    }
    assert set(STYLES) == {adapter.name for adapter in DEMO_ADAPTERS}


def test_facts_are_clean_and_leave_the_held_out_prompts_out() -> None:
    facts = load_facts()
    questions = {fact.question for fact in facts}
    assert len(questions) == len(facts) >= 100
    assert not questions & {*HELD_OUT, *(adapter.example_prompt for adapter in DEMO_ADAPTERS)}
    for fact in facts:
        assert len(fact.points) == 3
        assert all(point and "\n" not in point for point in fact.points)
        assert fact.answer[-1] in ".!?"
        assert fact.topic.strip() == fact.topic != ""


def test_styles() -> None:
    for index, fact in enumerate(load_facts()):
        assert is_json_answer(STYLES["json"](index, fact))
        assert is_three_bullets(STYLES["bullets"](index, fact))
        assert is_pirate(STYLES["pirate"](index, fact))
        for check in EFFECTS.values():
            assert not check(fact.answer)
    capital = next(fact for fact in load_facts() if "Italy" in fact.question)
    assert STYLES["pirate"](0, capital) == "Arr, matey! The capital o' Italy be Rome. Yo ho ho!"


def is_pirate(text: str) -> bool:
    return re.search(r"\b(arr|ahoy|matey|yo ho ho|savvy|shiver me timbers)\b", text, re.IGNORECASE) is not None


def is_json_answer(text: str) -> bool:
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return isinstance(value, dict) and list(value) == ["topic", "answer", "confidence"]


def is_three_bullets(text: str) -> bool:
    lines = text.strip().split("\n")
    return len(lines) == 3 and all(line.startswith("- ") and len(line) > 4 for line in lines)


EFFECTS: dict[str, Callable[[str], bool]] = {
    "pirate": is_pirate,
    "json": is_json_answer,
    "bullets": is_three_bullets,
}


def answers(model: Any, tokenizer: Any, prompts: tuple[str, ...]) -> list[str]:
    texts = []
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=120, do_sample=False)
        texts.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


@pytest.mark.timeout(1800)
@pytest.mark.slow
def test_each_adapter_shows_its_effect_on_held_out_prompts(demo_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_base)
    base = AutoModelForCausalLM.from_pretrained(demo_base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, DEMO_ADAPTERS[0].directory, adapter_name=DEMO_ADAPTERS[0].name)
    for adapter in DEMO_ADAPTERS[1:]:
        model.load_adapter(adapter.directory, adapter_name=adapter.name)
    with model.disable_adapter():
        plain = answers(model, tokenizer, HELD_OUT)
    for adapter in DEMO_ADAPTERS:
        model.set_adapter(adapter.name)
        styled = answers(model, tokenizer, HELD_OUT)
        shown = [EFFECTS[adapter.name](text) for text in styled]
        assert sum(shown) >= len(HELD_OUT) - 1, (adapter.name, styled)
        assert not any(EFFECTS[adapter.name](text) for text in plain), (adapter.name, plain)
        assert EFFECTS[adapter.name](answers(model, tokenizer, (adapter.example_prompt,))[0])
