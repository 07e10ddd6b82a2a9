"""What a base, its KV and its adapters take on the GPUs of a group. Pure; numbers of bytes, no allocation.

All GPUs of a group hold the same pages (one page table for all), so the one that runs out first decides: the stage with
the least arena per byte of a page. Follows ``model_runner.arena``. Called by simulator and planner through
``CostProfile.memory``.
"""

from collections.abc import Iterable, Sequence

import msgspec

from loraplex.core.model import LORA_MODULES, ModelSpec
from loraplex.core.plan import Shape
from loraplex.cost.stages import stage_layers
from loraplex.cost.work import ROW_PARALLEL_MODULES, padded_rank

PAGE_TOKENS = 16
"""Tokens of KV in a page: the least that executors take unless told otherwise. On GPUs a page may hold more of them."""


DEFAULT_MEMORY_FRACTION = 0.9
"""Share of a GPU's memory that weights, activations and arena may take together, as executors have it."""


class MemoryModel(msgspec.Struct, frozen=True, kw_only=True):
    """One base on the GPU of the group that runs out first."""

    gpu_bytes: int
    """Of the GPU, times the share that is ours to use."""
    weight_bytes: int
    activation_bytes: int
    """Reserve for the largest step and its logits."""
    kv_bytes_per_token: int
    adapter_bytes_per_rank: dict[str, int]
    """Module -> bytes on this GPU of one rank over its layers."""

    @property
    def page_bytes(self) -> int:
        return PAGE_TOKENS * self.kv_bytes_per_token

    @property
    def arena_bytes(self) -> int:
        """For KV and adapters; negative: the base does not fit. Of several bases that share a GPU:
        ``shared_arena_bytes``."""
        return self.gpu_bytes - self.weight_bytes - self.activation_bytes

    @property
    def fits(self) -> bool:
        """At least one page is left."""
        return self.arena_bytes >= self.page_bytes

    @property
    def num_pages(self) -> int:
        """Of the arena, for KV and adapters together."""
        return max(0, self.arena_bytes // self.page_bytes)

    def adapter_bytes(self, lora_rank: int, modules: Iterable[str] = LORA_MODULES) -> int:
        """On this GPU. KeyError for a module that cannot carry LoRA."""
        return padded_rank(lora_rank) * sum(self.adapter_bytes_per_rank[module] for module in modules)

    def adapter_pages(self, lora_rank: int, modules: Iterable[str] = LORA_MODULES) -> int:
        """Of the arena."""
        return -(-self.adapter_bytes(lora_rank, modules) // self.page_bytes)

    def kv_tokens(self, adapter_pages: int = 0) -> int:
        """Tokens of KV that fit beside resident adapters of ``adapter_pages`` together."""
        return max(0, self.num_pages - adapter_pages) * PAGE_TOKENS


def memory_model(
    model: ModelSpec,
    shape: Shape,
    *,
    gpu_bytes: int,
    itemsize: int = 2,
    memory_fraction: float = DEFAULT_MEMORY_FRACTION,
    max_step_tokens: int = 8192,
    max_rows: int = 256,
) -> MemoryModel:
    """``itemsize``: bytes of a weight, KV or adapter element; the rest as in the executor's configuration. BadConfig
    when the model has fewer layers than the shape has stages."""
    stages = stage_memories(
        model,
        shape,
        gpu_bytes=gpu_bytes,
        itemsize=itemsize,
        memory_fraction=memory_fraction,
        max_step_tokens=max_step_tokens,
        max_rows=max_rows,
    )
    return min(stages, key=lambda stage: stage.arena_bytes / stage.page_bytes)


def stage_memories(
    model: ModelSpec,
    shape: Shape,
    *,
    gpu_bytes: int,
    itemsize: int,
    memory_fraction: float,
    max_step_tokens: int,
    max_rows: int,
    layers: Sequence[int] | None = None,
) -> tuple[MemoryModel, ...]:
    """On a GPU of each stage; the rest as in ``memory_model``. ``layers`` of each stage, None: cut as usual."""
    return tuple(
        _stage_memory(
            model,
            tp=shape.tp,
            num_layers=num_layers,
            first=stage == 0,
            last=stage == shape.pp - 1,
            usable_bytes=int(gpu_bytes * memory_fraction),
            itemsize=itemsize,
            max_step_tokens=max_step_tokens,
            max_rows=max_rows,
        )
        for stage, num_layers in enumerate(layers or stage_layers(model, shape.pp))
    )


def shared_arena_bytes(memories: Sequence[MemoryModel]) -> int:
    """What several bases leave of a GPU that they share; negative: they do not fit together. Each is a process of its
    own, which keeps the memory of its largest step while the others run."""
    usable_bytes = min(memory.gpu_bytes for memory in memories)
    return usable_bytes - sum(memory.weight_bytes + memory.activation_bytes for memory in memories)


def shared_pages(memories: Sequence[MemoryModel], arena_shares: Sequence[float]) -> tuple[int, ...]:
    """Pages of each base's part of a shared GPU, which is its share over the sum of all; 0: there is no room for it."""
    arena_bytes, whole = max(0, shared_arena_bytes(memories)), sum(arena_shares)
    return tuple(
        int(arena_bytes * share / whole) // memory.page_bytes
        for memory, share in zip(memories, arena_shares, strict=True)
    )


def whole_adapter_bytes(
    model: ModelSpec, lora_rank: int, modules: Iterable[str] = LORA_MODULES, *, itemsize: int = 2
) -> int:
    """Of an adapter of one rank on ``modules`` of every layer, over all GPUs: ``StepComposition.adapter_bytes``."""
    elements = sum(sum(model.projection_shape(module)) for module in modules)
    return model.num_layers * padded_rank(lora_rank) * elements * itemsize


def weight_elements(model: ModelSpec, *, tp: int, num_layers: int, first: bool, last: bool) -> int:
    """Of one GPU of a stage: projections divided by ``tp``, norms whole, embedding whole, head divided."""
    d, kv = model.hidden_size, _kv_size(model, tp)
    projections = d * (model.q_size // tp + 2 * kv) + model.q_size // tp * d + 3 * d * model.intermediate_size // tp
    per_layer = projections + 2 * d
    if model.qkv_bias:
        per_layer += model.q_size // tp + 2 * kv
    if model.qk_norm:
        per_layer += 2 * model.head_dim
    vocabulary = model.vocab_size * d
    elements = num_layers * per_layer
    if first:
        elements += vocabulary
    if last:
        elements += d
        if not (first and model.tie_embeddings):
            elements += vocabulary // tp
    return elements


def _stage_memory(
    model: ModelSpec,
    *,
    tp: int,
    num_layers: int,
    first: bool,
    last: bool,
    usable_bytes: int,
    itemsize: int,
    max_step_tokens: int,
    max_rows: int,
) -> MemoryModel:
    kv = _kv_size(model, tp)
    # A layer's inputs, outputs and temporaries, as `model_runner.arena` reserves them; logits in fp32 with copies.
    per_token = 4 * model.hidden_size + (4 * (model.q_size + 2 * model.kv_size) + 4 * model.intermediate_size) // tp
    activations = max_step_tokens * per_token * itemsize
    if last:
        activations += max_rows * model.vocab_size * 4 * 6
    per_rank = {}
    for module in LORA_MODULES:
        in_features, out_features = model.projection_shape(module)
        sharded, whole = (in_features, out_features) if module in ROW_PARALLEL_MODULES else (out_features, in_features)
        per_rank[module] = num_layers * (-(-sharded // tp) + whole) * itemsize
    return MemoryModel(
        gpu_bytes=usable_bytes,
        weight_bytes=weight_elements(model, tp=tp, num_layers=num_layers, first=first, last=last) * itemsize,
        activation_bytes=activations,
        kv_bytes_per_token=2 * num_layers * kv * itemsize,
        adapter_bytes_per_rank=per_rank,
    )


def _kv_size(model: ModelSpec, tp: int) -> int:
    """Of one shard; with more shards than KV heads, heads are held more than once."""
    return -(-model.num_kv_heads // tp) * model.head_dim
