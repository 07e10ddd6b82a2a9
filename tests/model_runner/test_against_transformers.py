"""Greedy tokens and logits equal transformers + PEFT (fp32, eager): every family, alone, chunked, mixed and shared."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

FAMILIES = ("llama", "smollm", "mistral", "qwen2", "qwen3")
ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "everything": {
        "r": 16,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    },
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "use_rslora": True,
        "target_modules": ["k_proj", "o_proj", "up_proj", "down_proj"],
        "rank_pattern": {"down_proj": 12, "layers.1.self_attn.k_proj": 5},
        "alpha_pattern": {"up_proj": 11},
    },
    "one-layer": {"r": 3, "lora_alpha": 9, "target_modules": ["gate_proj"], "layers_to_transform": [1]},
}


@pytest.fixture(scope="module", params=FAMILIES)
def world(request: pytest.FixtureRequest, make_base: Any, add_adapter: Any) -> tuple[Any, dict[str, Any]]:
    base = make_base(request.param)
    return base, {name: add_adapter(base, name, **options) for name, options in ADAPTERS.items()}


@pytest.fixture
def driver(world: tuple[Any, dict[str, Any]], make_driver: Callable[..., Any]) -> Any:
    base, adapters = world
    driver = make_driver(base.directory)
    for adapter in adapters.values():
        driver.load(adapter.manifest, adapter.path)
    return driver


def prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 199, (length,), generator=generator).tolist()


def test_base_alone(world: Any, driver: Any, check: Any) -> None:
    request = driver.open(prompt(37, seed=1))
    driver.run([request], num_tokens=24)
    check(world[0], driver, request)


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_alone(world: Any, driver: Any, name: str, check: Any) -> None:
    request = driver.open(prompt(29, seed=2), name)
    base = driver.open(prompt(29, seed=2))
    driver.run([request], num_tokens=12)
    check(world[0], driver, request)
    driver.run([base], num_tokens=1)
    change = driver.sampler.logits[request.slot][0] - driver.sampler.logits[base.slot][0]
    assert change.abs().max() > 0.05, "the adapter has an effect to be checked"


@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_mixed_batch_with_chunked_prefill(world: Any, driver: Any, chunk: int, check: Any) -> None:
    names = [None, *ADAPTERS, None, "everything"]
    requests = [driver.open(prompt(7 + 6 * index, seed=index), name) for index, name in enumerate(names)]
    driver.run(requests, num_tokens=16, chunk=chunk)
    for request in requests:
        check(world[0], driver, request)


@pytest.mark.parametrize("name", [None, "everything"])
def test_prefix_pages_are_shared(world: Any, driver: Any, name: str | None, check: Any) -> None:
    first = driver.open(prompt(26, seed=7), name)
    driver.run([first], num_tokens=5)
    second = driver.open([*first.prompt[:22], 3, 1, 4], name, prefix_of=first)
    same = driver.open(list(first.prompt), name, prefix_of=first)
    assert second.done == 20
    driver.run([second, same], num_tokens=8)
    check(world[0], driver, second)
    check(world[0], driver, same)
    driver.run([first], num_tokens=10)
    check(world[0], driver, first)


@pytest.mark.parametrize("world", ["llama"], indirect=True)
def test_half_precision_adapters_load(world: Any, driver: Any, add_adapter: Any, check: Any) -> None:
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        adapter = add_adapter(world[0], name, dtype=dtype, r=8, lora_alpha=8, target_modules=["q_proj", "o_proj"])
        driver.load(adapter.manifest, adapter.path)
        request = driver.open(prompt(11, seed=3), adapter.manifest.digest)
        driver.run([request], num_tokens=4)
        check(world[0], driver, request)
