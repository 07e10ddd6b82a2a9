"""What a base gets of the GPUs that it shares with the other bases of its group: its executor's config says it. Pure.

Called by whoever starts the replicas of a group: it knows all of them, each replica only itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from loraplex.core.model import ModelSpec
from loraplex.core.plan import Shape
from loraplex.cost.memory import stage_memories
from loraplex.model_runner.config import ExecutorConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbour:
    """Another base of the group."""

    model: ModelSpec
    config: ExecutorConfig
    """In the shape of the group."""
    arena_share: float = 1.0


def part_of_group(
    config: ExecutorConfig, neighbours: Sequence[Neighbour], *, arena_share: float = 1.0
) -> ExecutorConfig:
    """``config`` (in the shape of the group) of a base that leaves its neighbours their weights, their largest steps
    and their part of the arena: ``arena_share`` over the sum of all shares is its own. An arena of a given size, as on
    a CPU, is shared alike."""
    if not neighbours:
        return config
    whole = arena_share + sum(neighbour.arena_share for neighbour in neighbours)
    held = [_held_bytes(neighbour) for neighbour in neighbours]
    return msgspec.structs.replace(
        config,
        arena_share=arena_share / whole,
        reserved_bytes=tuple(map(sum, zip(*held, strict=True))),
        memory_fraction=min(config.memory_fraction, *(n.config.memory_fraction for n in neighbours)),
    )


def _held_bytes(neighbour: Neighbour) -> tuple[int, ...]:
    """On a GPU of each stage, arena aside."""
    config = neighbour.config
    stages = stage_memories(
        neighbour.model,
        Shape(tp=config.tp, pp=config.pp),
        gpu_bytes=0,
        itemsize=_itemsize(config),
        memory_fraction=config.memory_fraction,
        max_step_tokens=config.max_step_tokens,
        max_rows=config.max_rows,
        layers=config.stage_layers,
    )
    return tuple(stage.weight_bytes + stage.activation_bytes for stage in stages)


def _itemsize(config: ExecutorConfig) -> int:
    wide = config.dtype == "float32" or (config.dtype == "auto" and config.device == "cpu")
    return 4 if wide else 2
