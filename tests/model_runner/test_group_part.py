"""Bases that share a group's GPUs: their parts add up to what there is, and those that do not fit are refused."""

import msgspec
import pytest
from loraplex.core.errors import BadConfig
from loraplex.core.ids import BaseModelId
from loraplex.core.model import ModelSpec
from loraplex.core.plan import Shape
from loraplex.cost.memory import stage_memories
from loraplex.cost.stages import stage_layers
from loraplex.model_runner import ExecutorConfig, build_executor
from loraplex.model_runner.arena import plan_arena, room_beside
from loraplex.model_runner.build import load_model_spec
from loraplex.model_runner.group_part import Neighbour, part_of_group
from loraplex.model_runner.shard import plan_shards

TOTAL_BYTES = 80 << 30
LARGE, SMALL = (load_model_spec(f"random:{name}", BaseModelId(name)) for name in ("llama3-8b", "llama3-1b"))


def config(shape: Shape, **more: object) -> ExecutorConfig:
    return msgspec.convert({"device": "cuda", "tp": shape.tp, "pp": shape.pp, **more}, ExecutorConfig)


@pytest.mark.parametrize("shape", [Shape(), Shape(tp=2), Shape(pp=2)], ids=str)
def test_parts_fill_the_gpus_and_no_more(shape: Shape) -> None:
    shares = {LARGE: 3.0, SMALL: 1.0}
    parts = {
        model: part_of_group(
            config(shape), [Neighbour(model=other, config=config(shape), arena_share=shares[other])], arena_share=share
        )
        for (model, share), other in zip(shares.items(), (SMALL, LARGE), strict=True)
    }
    for stage in range(shape.pp):
        taken = {model: on_stage(part, model, shape, stage) for model, part in parts.items()}
        held = sum(weights + step for weights, step, _ in taken.values())
        arenas = {model: arena for model, (_, _, arena) in taken.items()}
        left = 0.9 * TOTAL_BYTES - held
        assert arenas[LARGE] == pytest.approx(0.75 * left, rel=0.02)
        assert arenas[SMALL] == pytest.approx(0.25 * left, rel=0.02)
        assert sum(arenas.values()) <= left


def on_stage(part: ExecutorConfig, model: ModelSpec, shape: Shape, stage: int) -> tuple[int, int, int]:
    """Bytes of (weights, largest step, arena with its tables) on a GPU of it."""
    memory = stage_memories(
        model,
        shape,
        gpu_bytes=0,
        itemsize=2,
        memory_fraction=1.0,
        max_step_tokens=part.max_step_tokens,
        max_rows=part.max_rows,
    )[stage]
    shard = plan_shards(model, shape, stage_layers(model, shape.pp))[stage * shape.tp]
    room = room_beside(part, stage=stage, total_bytes=TOTAL_BYTES, own_bytes=memory.weight_bytes)
    plan = plan_arena(part, shard.local, room_bytes=room, itemsize=2)
    return memory.weight_bytes, memory.activation_bytes, plan.num_pages * plan.page_bytes + plan.record_bytes


def test_one_base_has_all() -> None:
    alone = config(Shape())
    assert part_of_group(alone, []) == alone


def test_the_smallest_fraction_of_the_memory_holds_for_all() -> None:
    neighbour = Neighbour(model=SMALL, config=config(Shape(), memory_fraction=0.5))
    assert part_of_group(config(Shape()), [neighbour]).memory_fraction == 0.5


@pytest.mark.parametrize("given", [{"num_pages": 100}, {"arena_bytes": 100 * 16 * 1024}, {}])
def test_an_arena_on_the_cpu_is_shared_alike(given: dict[str, int]) -> None:
    pages = []
    for share in (1.0, 0.25):
        part = ExecutorConfig(arena_share=share, **given)
        executor = build_executor(part, model="random:tiny-llama", base_model_id=BaseModelId("b"))
        pages.append(executor.arena.num_pages)
        executor.close()
    assert pages[1] == pages[0] // 4


def test_a_share_that_holds_no_page_is_refused() -> None:
    part = ExecutorConfig(num_pages=10, arena_share=0.01)
    with pytest.raises(BadConfig, match="an arena of 10 pages has none for a share"):
        build_executor(part, model="random:tiny-llama", base_model_id=BaseModelId("b"))


def test_what_neighbours_take_follows_from_their_number_format() -> None:
    wide = Neighbour(model=SMALL, config=config(Shape(), dtype="float32"))
    narrow = Neighbour(model=SMALL, config=config(Shape()))
    (more,), (less,) = (part_of_group(config(Shape()), [one]).reserved_bytes for one in (wide, narrow))
    assert more > 1.5 * less > SMALL.num_layers
