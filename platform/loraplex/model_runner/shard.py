"""What one rank of a group holds of a model: its stage's layers, and its part of each of them. Pure.

Queries, keys, values, gate and up are split by columns, attention's output and down by rows; so are adapters: B of the
former, A of the latter, and the other matrix is whole on every rank. With fewer KV heads than shards a head lies on
several ranks. The embedding is whole on the first stage, whose ranks look up their tokens without a collective; the
head, which every step reads in full, is split by tokens of the vocabulary. Called by what loads and runs a model.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Self

from loraplex.core.adapter import AdapterBlock
from loraplex.core.errors import BadConfig
from loraplex.core.model import ModelSpec
from loraplex.core.plan import Shape
from loraplex.core.shape_check import check_shape

_ROW_SPLIT = ("o_proj", "down_proj")
_KEY_VALUE = ("k_proj", "v_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    model: ModelSpec
    """All of it."""
    local: ModelSpec
    """The rank's part, as a model of its own: layers, heads and intermediate columns that it holds."""
    shape: Shape
    tp_rank: int
    stage: int
    first_layer: int
    """Of the stage; it has ``local.num_layers``."""

    @classmethod
    def whole(cls, model: ModelSpec) -> Self:
        """Of a group of one rank."""
        return cls(model=model, local=model, shape=Shape(), tp_rank=0, stage=0, first_layer=0)

    @property
    def rank(self) -> int:
        """In the group: the shards of a stage stand together."""
        return self.stage * self.shape.tp + self.tp_rank

    @property
    def is_first(self) -> bool:
        """Of the stages: it holds the embedding."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Of the stages: it holds the final norm and its part of the head, and samples."""
        return self.stage == self.shape.pp - 1

    @property
    def layers(self) -> range:
        return range(self.first_layer, self.first_layer + self.local.num_layers)

    @property
    def vocabulary(self) -> slice:
        """Rows of the head; the last shards may have fewer than others, or none."""
        size = self.vocabulary_share
        end = self.model.vocab_size
        return slice(min(self.tp_rank * size, end), min((self.tp_rank + 1) * size, end))

    @property
    def vocabulary_share(self) -> int:
        """Of the shard that has most."""
        return -(-self.model.vocab_size // self.shape.tp)

    def inputs(self, module: str) -> slice:
        """Input features of a projection: columns of its weight, and of A."""
        size = self.local.projection_shape(module)[0]
        start = self.tp_rank * size if module in _ROW_SPLIT else 0
        return slice(start, start + size)

    def outputs(self, module: str) -> slice:
        """Output features of a projection: rows of its weight, its bias, and B."""
        size = self.local.projection_shape(module)[1]
        start = 0
        if module in _KEY_VALUE:
            start = self.tp_rank * self.model.num_kv_heads // self.shape.tp * self.model.head_dim
        elif module not in _ROW_SPLIT:
            start = self.tp_rank * size
        return slice(start, start + size)

    def blocks(self, blocks: Iterable[AdapterBlock]) -> tuple[AdapterBlock, ...]:
        """Of an adapter's blocks those of the stage, their layers counted from its first."""
        if self.shape.pp == 1:
            return tuple(blocks)
        layers = self.layers
        return tuple(replace(block, layer=block.layer - layers.start) for block in blocks if block.layer in layers)


def plan_shards(model: ModelSpec, shape: Shape, stage_layers: Sequence[int]) -> tuple[Shard, ...]:
    """One for each rank. ``stage_layers``: how many layers each stage has. BadConfig when that cannot be."""
    check_shape(model, shape)
    if len(stage_layers) != shape.pp or sum(stage_layers) != model.num_layers or min(stage_layers) < 1:
        cut = " + ".join(map(str, stage_layers))
        raise BadConfig(
            f"{model.base_model_id}: stages of {cut} layers are not {shape.pp} stages of {model.num_layers} layers",
            param="stage_layers",
        )
    shards = []
    for stage, num_layers in enumerate(stage_layers):
        local = replace(
            model,
            num_layers=num_layers,
            num_heads=model.num_heads // shape.tp,
            num_kv_heads=max(model.num_kv_heads // shape.tp, 1),
            intermediate_size=model.intermediate_size // shape.tp,
        )
        for tp_rank in range(shape.tp):
            shards.append(
                Shard(
                    model=model,
                    local=local,
                    shape=shape,
                    tp_rank=tp_rank,
                    stage=stage,
                    first_layer=sum(stage_layers[:stage]),
                )
            )
    return tuple(shards)
