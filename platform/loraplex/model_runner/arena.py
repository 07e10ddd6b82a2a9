"""The one byte arena of a device: KV pages and adapter blocks are typed views of it.

Owns the bytes; page ids are given out by the engine and only turned into addresses here. Called by the executor and
the device tier of adapters. Legend: P pages.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from loraplex_kernels import KvLayout, KvPages, view_kv_pages
from loraplex_kernels.gpu.lora_tiles import MAX_RANK

from loraplex.core.errors import BadConfig
from loraplex.core.model import LORA_MODULES, ModelSpec
from loraplex.core.step import ArenaSpec
from loraplex.cost.memory import PAGE_TOKENS
from loraplex.model_runner.config import ExecutorConfig

_DEFAULT_CPU_BYTES = 1 << 30
_MOST_PAGE_TOKENS = 64


class Arena:
    def __init__(self, model: ModelSpec, *, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device):
        """``model``: the rank's part, as everywhere in this file. Zeroed, so that a slot that a mask hides holds a
        finite number from the start."""
        layout = KvLayout(
            num_layers=model.num_layers,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            page_size=page_size,
        )
        page_bytes = layout.elements_per_page * dtype.itemsize
        if num_pages < 1:
            raise BadConfig(f"the arena has no room for one page of {page_bytes} bytes", param="arena_bytes")
        self.spec = ArenaSpec(num_pages=num_pages, page_size=page_size, page_bytes=page_bytes)
        self.dtype = dtype
        self.pages = torch.zeros((num_pages, page_bytes), dtype=torch.uint8, device=device)
        """(P, page_bytes) uint8."""
        self.elements = self.pages.view(-1).view(dtype)
        """All of it, flat, in ``dtype``."""
        self.kv: KvPages = view_kv_pages(self.elements, layout)

    def matrix(self, page: int, offset_bytes: int, num_rows: int, num_columns: int) -> torch.Tensor:
        """A dense (num_rows, num_columns) view of the arena's dtype, ``offset_bytes`` into ``page``."""
        first = (page * self.spec.page_bytes + offset_bytes) // self.dtype.itemsize
        return self.elements[first : first + num_rows * num_columns].view(num_rows, num_columns)

    def clear(self, pages: torch.Tensor) -> None:
        """Zeroes ``pages`` ((n,) int64) before their first KV: masked slots must hold finite numbers."""
        self.pages.index_fill_(0, pages, 0)


def page_tokens(config: ExecutorConfig, parts: Iterable[ModelSpec]) -> int:
    """Tokens of KV in a page, the same on all ranks; ``parts``: each rank's part of the model. Pure.

    Unless ``config`` says it: 16, on GPUs doubled up to 64 until a page of each rank holds 64 LoRA ranks of its widest
    projection.
    """
    if config.page_size is not None:
        return config.page_size
    if config.device == "cpu":
        return PAGE_TOKENS
    return max(map(_page_tokens, parts))


def _page_tokens(part: ModelSpec) -> int:
    # KV and adapters are of one dtype: elements will do.
    matrix = MAX_RANK * max(max(part.projection_shape(module)) for module in LORA_MODULES)
    tokens = PAGE_TOKENS
    while tokens < _MOST_PAGE_TOKENS and tokens * part.kv_elements_per_token < matrix:
        tokens *= 2
    return tokens


def plan_num_pages(
    config: ExecutorConfig, model: ModelSpec, *, dtype: torch.dtype, device: torch.device, stage: int = 0
) -> int:
    """Pages that fit, with the weights already on ``device``, which is one of ``stage``. Raises BadConfig when the
    options contradict, or others leave no room."""
    page_bytes = page_tokens(config, (model,)) * model.kv_elements_per_token * dtype.itemsize
    if config.num_pages is not None and config.arena_bytes is not None:
        raise BadConfig("give num_pages or arena_bytes, not both", param="num_pages")
    if config.num_pages is not None:
        return _part(config, config.num_pages)
    if config.arena_bytes is not None:
        return _part(config, config.arena_bytes // page_bytes)
    if device.type == "cpu":
        return _part(config, max(_DEFAULT_CPU_BYTES // page_bytes, 1))
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    if not config.reserved_bytes:
        room_bytes = int(free_bytes - (1 - config.memory_fraction) * total_bytes)
        return plan_arena(config, model, room_bytes=room_bytes, itemsize=dtype.itemsize).num_pages
    if len(config.reserved_bytes) != config.pp:
        raise BadConfig(f"reserved_bytes: {config.pp} stages need as many numbers", param="reserved_bytes")
    room_bytes = room_beside(
        config, stage=stage, total_bytes=total_bytes, own_bytes=torch.cuda.memory_allocated(device)
    )
    num_pages = plan_arena(config, model, room_bytes=room_bytes, itemsize=dtype.itemsize).num_pages
    if num_pages < 1:
        raise BadConfig(
            f"{model.base_model_id} does not fit beside the group's other bases: of {total_bytes} bytes on {device} "
            f"they take {config.reserved_bytes[stage]}",
            param="reserved_bytes",
        )
    return num_pages


def room_beside(config: ExecutorConfig, *, stage: int, total_bytes: int, own_bytes: int) -> int:
    """Bytes for step and arenas of all on a device of ``total_bytes`` that others share, with weights of ``own_bytes``.
    Not of what is free now: the others may still be loading, or be done. Pure."""
    return int(total_bytes * config.memory_fraction) - config.reserved_bytes[stage] - own_bytes


def _part(config: ExecutorConfig, num_pages: int) -> int:
    """BadConfig when others leave none."""
    part = int(num_pages * config.arena_share)
    if part < 1 <= num_pages:
        raise BadConfig(
            f"an arena of {num_pages} pages has none for a share of {config.arena_share:g}", param="arena_share"
        )
    return part


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaPlan:
    """What becomes of the bytes that are left beside the weights of a CUDA device."""

    num_pages: int
    page_bytes: int
    record_bytes: int
    """Table of resident adapters: a record for each page, since no adapter is smaller."""
    page_table_bytes: int
    step_bytes: int
    """Activations of the largest step, its logits and the sampler's copies of them."""

    @property
    def kv_share(self) -> float:
        """KV bytes of an arena without adapters / bytes of arena, adapter table and page tables."""
        kv_bytes = self.num_pages * self.page_bytes
        return kv_bytes / (kv_bytes + self.record_bytes + self.page_table_bytes)


def plan_arena(config: ExecutorConfig, model: ModelSpec, *, room_bytes: int, itemsize: int) -> ArenaPlan:
    """As many pages as fit into our share of ``room_bytes``, with all that they bring along. Pure."""
    page_size = page_tokens(config, (model,))
    page_bytes = page_size * model.kv_elements_per_token * itemsize
    # Two int64 entries, of A and of B, for each projection.
    record_bytes = model.num_layers * len(LORA_MODULES) * 16
    page_table_bytes = config.max_rows * -(-model.max_context_tokens // page_size) * 4
    step_bytes = _step_bytes(config, model, itemsize)
    arena_bytes = int((room_bytes - page_table_bytes - step_bytes) * config.arena_share)
    num_pages = arena_bytes // (page_bytes + record_bytes)
    return ArenaPlan(
        num_pages=num_pages,
        page_bytes=page_bytes,
        record_bytes=num_pages * record_bytes,
        page_table_bytes=page_table_bytes,
        step_bytes=step_bytes,
    )


def _step_bytes(config: ExecutorConfig, model: ModelSpec, itemsize: int) -> int:
    """Activations of the largest step (a layer's inputs, outputs and temporaries) and its logits in the sampler."""
    per_token = 4 * model.hidden_size + 4 * (model.q_size + 2 * model.kv_size) + 4 * model.intermediate_size
    logits_bytes = config.max_rows * model.vocab_size * 4 * 6
    return config.max_step_tokens * per_token * itemsize + logits_bytes
