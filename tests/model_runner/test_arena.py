"""Tokens of a page: as many as keep adapters of 64 ranks whole on a GPU, the same on all ranks of a group."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from loraplex.core.adapter import AdapterBlock
from loraplex.core.ids import BaseModelId
from loraplex.core.model import LORA_MODULES, ModelSpec
from loraplex.core.plan import Shape
from loraplex.cost.memory import PAGE_TOKENS
from loraplex.cost.stages import stage_layers
from loraplex.model_runner import ExecutorConfig, build, build_executor
from loraplex.model_runner.adapter_layout import plan_shard_layout
from loraplex.model_runner.arena import page_tokens, plan_arena
from loraplex.model_runner.build import load_model_spec
from loraplex.model_runner.gpu.records import plan_records
from loraplex.model_runner.shard import Shard, plan_shards
from loraplex_kernels.gpu.lora import MAX_RANK

GPU = ExecutorConfig(device="cuda")
ITEMSIZE = 2
SHAPES = (Shape(), Shape(tp=2), Shape(pp=2), Shape(pp=4), Shape(tp=2, pp=2))
SIZES = {
    "llama3-8b": (16, 16, 32, 64, 32),
    "mistral-7b": (16, 16, 32, 64, 32),
    "llama3-70b": (16, 16, 32, 64, 32),
    "llama3-1b": (32, 32, 64, 64, 64),
    "qwen2.5-0.5b": (64, 64, 64, 64, 64),
}
"""By shape."""
CUT = {
    ("llama3-8b", Shape(pp=4)),
    *(("llama3-1b", shape) for shape in SHAPES if shape.pp > 1),
    *(("qwen2.5-0.5b", shape) for shape in SHAPES if shape.pp > 1),
}
"""Stages of so few layers that 64 tokens, the most that a page has, are less than a matrix of 64 ranks."""


def spec_of(name: str) -> ModelSpec:
    return load_model_spec(f"random:{name}", BaseModelId(name))


def shards_of(spec: ModelSpec, shape: Shape) -> tuple[Shard, ...]:
    return plan_shards(spec, shape, stage_layers(spec, shape.pp))


def parts_of(shards: tuple[Shard, ...]) -> list[ModelSpec]:
    return [shard.local for shard in shards]


def num_planes(shards: tuple[Shard, ...], page_size: int, lora_rank: int) -> int:
    """Of an adapter on all projections, on the rank that has most."""
    blocks = tuple(
        AdapterBlock(layer=layer, module=module, lora_rank=lora_rank, scale=1.0)
        for layer in range(shards[0].model.num_layers)
        for module in LORA_MODULES
    )
    most = 0
    for shard in shards:
        page_bytes = page_size * shard.local.kv_elements_per_token * ITEMSIZE
        layout = plan_shard_layout(blocks, shard, page_bytes=page_bytes, itemsize=ITEMSIZE)
        most = max(most, plan_records(layout, shard.local, itemsize=ITEMSIZE).num_planes)
    return most


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_adapters_of_64_ranks_are_not_cut_on_a_gpu(name: str, shape: Shape) -> None:
    shards = shards_of(spec_of(name), shape)
    size = page_tokens(GPU, parts_of(shards))
    assert size == SIZES[name][SHAPES.index(shape)]
    assert size in (16, 32, 64)
    if (name, shape) in CUT:
        assert size == 64
        widest = max(max(shards[-1].local.projection_shape(module)) for module in LORA_MODULES)
        assert size * shards[-1].local.kv_elements_per_token < MAX_RANK * widest
    else:
        assert [num_planes(shards, size, lora_rank) for lora_rank in (32, 48, MAX_RANK)] == [1, 1, 1]
    if size > 16 and (name, shape) not in CUT:
        assert num_planes(shards, 16, MAX_RANK) > 1, "smaller pages would have done"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_cpu_keeps_small_pages_and_a_given_number_holds(shape: Shape) -> None:
    parts = parts_of(shards_of(spec_of("llama3-1b"), shape))
    assert page_tokens(ExecutorConfig(), parts) == PAGE_TOKENS == 16
    for device in ("cpu", "cuda"):
        assert page_tokens(ExecutorConfig(device=device, page_size=8), parts) == 8


def test_plans_of_an_arena_count_in_pages_of_that_size() -> None:
    spec = spec_of("llama3-1b")
    plans = [
        plan_arena(config, spec, room_bytes=40 << 30, itemsize=ITEMSIZE)
        for config in (GPU, ExecutorConfig(device="cuda", page_size=16))
    ]
    assert plans[0].page_bytes == 2 * plans[1].page_bytes == 32 * spec.kv_elements_per_token * ITEMSIZE
    assert plans[0].num_pages == pytest.approx(plans[1].num_pages / 2, rel=0.01)


def test_the_ranks_of_a_group_are_told_the_size_of_their_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """28 layers by themselves would have pages of 16 tokens, 4 layers of 64."""
    told: list[ExecutorConfig] = []
    monkeypatch.setattr(build, "rank_device", lambda config, rank=0: torch.device(config.device))
    monkeypatch.setattr(build, "GroupExecutor", lambda config, *_, **__: told.append(config))
    launcher: Any = object()
    for given in (None, 16):
        config = ExecutorConfig(device="cuda", pp=2, stage_layers=(28, 4), page_size=given)
        build_executor(config, model="random:llama3-8b", base_model_id=BaseModelId("base"), launcher=launcher)
    parts = parts_of(plan_shards(spec_of("llama3-8b"), Shape(pp=2), (28, 4)))
    assert [page_tokens(GPU, (part,)) for part in parts] == [16, 64]
    assert [config.page_size for config in told] == [64, 16]
