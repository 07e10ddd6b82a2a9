"""Bytes of weights, KV and adapters on the GPUs of a group."""

import dataclasses

import pytest
from loraplex.core.model import LORA_MODULES, ModelSpec
from loraplex.core.plan import Shape
from loraplex.cost.memory import (
    memory_model,
    shared_arena_bytes,
    shared_pages,
    weight_elements,
    whole_adapter_bytes,
)
from loraplex.cost.stages import stage_layers

GIB = 1 << 30


def test_an_8b_llama_on_one_gpu(llama_8b: ModelSpec) -> None:
    memory = memory_model(llama_8b, Shape(), gpu_bytes=80 * GIB)
    assert memory.weight_bytes == 2 * 8_030_261_248
    assert memory.kv_bytes_per_token == 128 << 10
    assert memory.page_bytes == 2 << 20
    assert memory.adapter_bytes(16) == whole_adapter_bytes(llama_8b, 16) == 83_886_080
    assert memory.adapter_pages(16) == 40
    assert memory.adapter_bytes(9, ("q_proj",)) == 32 * 16 * (4096 + 4096) * 2
    # With no adapter the whole arena is KV: tokens per GiB to within a page.
    assert memory.kv_tokens() == pytest.approx(memory.arena_bytes / GIB * 8192, abs=16)
    assert memory.kv_tokens(40) == memory.kv_tokens() - 40 * 16


@pytest.mark.parametrize("shape", [Shape(tp=2), Shape(tp=8), Shape(pp=2), Shape(tp=2, pp=4)])
def test_shapes_divide_weights_kv_and_adapters(llama_8b: ModelSpec, shape: Shape) -> None:
    one = memory_model(llama_8b, Shape(), gpu_bytes=80 * GIB)
    group = memory_model(llama_8b, shape, gpu_bytes=80 * GIB)
    # The first stage runs out first: it has the embedding, and more layers than the last one, which has the head.
    share = stage_layers(llama_8b, shape.pp)[0] / llama_8b.num_layers / shape.tp
    assert group.kv_bytes_per_token == share * one.kv_bytes_per_token
    assert share * one.adapter_bytes(16) <= group.adapter_bytes(16) < one.adapter_bytes(16)
    assert one.weight_bytes / shape.num_ranks <= group.weight_bytes < one.weight_bytes
    assert group.kv_tokens() > one.kv_tokens() / share


def test_stages_hold_every_weight_once(llama_8b: ModelSpec) -> None:
    first = weight_elements(llama_8b, tp=1, num_layers=20, first=True, last=False)
    last = weight_elements(llama_8b, tp=1, num_layers=12, first=False, last=True)
    assert first + last == weight_elements(llama_8b, tp=1, num_layers=32, first=True, last=True)


def test_more_shards_than_kv_heads_hold_heads_twice(llama_8b: ModelSpec) -> None:
    few = dataclasses.replace(llama_8b, num_kv_heads=2)
    two, four = (memory_model(few, Shape(tp=tp), gpu_bytes=80 * GIB) for tp in (2, 4))
    assert two.kv_bytes_per_token == four.kv_bytes_per_token


def test_what_does_not_fit(llama_8b: ModelSpec) -> None:
    memory = memory_model(llama_8b, Shape(), gpu_bytes=16 * GIB)
    assert not memory.fits
    assert memory.num_pages == memory.kv_tokens() == 0
    assert memory_model(llama_8b, Shape(tp=2), gpu_bytes=16 * GIB).fits


def test_unknown_module(llama_8b: ModelSpec) -> None:
    memory = memory_model(llama_8b, Shape(), gpu_bytes=80 * GIB)
    with pytest.raises(KeyError):
        memory.adapter_bytes(8, ("lm_head",))
    assert set(memory.adapter_bytes_per_rank) == set(LORA_MODULES)


def test_bases_that_share_a_gpu_leave_less_and_divide_it_by_their_shares(llama_8b: ModelSpec) -> None:
    memory = memory_model(llama_8b, Shape(), gpu_bytes=80 * GIB)
    left = shared_arena_bytes([memory, memory])
    assert left == memory.gpu_bytes - 2 * (memory.weight_bytes + memory.activation_bytes)
    assert shared_pages([memory], [0.3]) == (memory.num_pages,)
    assert shared_pages([memory, memory], [3.0, 1.0]) == (
        int(0.75 * left) // memory.page_bytes,
        int(0.25 * left) // memory.page_bytes,
    )
    assert shared_pages([memory] * 5, [1.0] * 5) == (0,) * 5
