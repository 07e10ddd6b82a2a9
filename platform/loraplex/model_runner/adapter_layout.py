"""Where an adapter's blocks lie in its pages: a pure packing, known before any tensor is read.

Projections that share an input form a site; their A blocks are stacked so that one product shrinks for all of them,
each B stands alone, transposed. Ranks are padded to multiples of 8. A matrix larger than a page is cut along the rank,
so that any free pages serve; stacked A between its blocks, where these fit into a page. The same for all ranks, each
with its own part of the model and its own size of a page. Called by both adapter tiers and by the executors'
``adapter_pages``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from loraplex.core.adapter import AdapterBlock
from loraplex.core.errors import BadAdapter, BadConfig
from loraplex.core.model import ModelSpec
from loraplex.model_runner.shard import Shard

SITES = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Projections of a layer by the input that they share, in the column order of the fused weights."""

_RANK_MULTIPLE = 8
_ALIGN_BYTES = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedBlock:
    """One block of the manifest inside its site."""

    block: AdapterBlock
    site: int
    """Number over the whole model: layer * len(SITES) + index in SITES."""
    rank_start: int
    """First row in the site's stacked rank."""

    @property
    def rank_end(self) -> int:
        """Behind its last row, the padding to a multiple of 8 included."""
        return self.rank_start + _padded(self.block.lora_rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterPart:
    """Rows [rank_start, rank_end) of a site's stacked rank, of A or of one B, dense and row-major."""

    site: int
    placed: PlacedBlock | None
    """None: stacked A. Otherwise B (transposed) of this block."""
    rank_start: int
    rank_end: int
    num_columns: int
    page: int
    """Index into the adapter's pages."""
    offset_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterLayout:
    num_pages: int
    """1 or more, also where it holds nothing."""
    blocks: tuple[PlacedBlock, ...]
    parts: tuple[AdapterPart, ...]
    """Of each site first A, then each B in the order of its projections; ranks ascend."""
    block_parts: tuple[tuple[AdapterPart, ...], ...]
    """Of each of ``blocks``: the parts that hold rows of it, A before B."""
    site_ranks: tuple[tuple[int, int], ...]
    """(site, stacked rank) of the sites that the adapter touches."""


@lru_cache(maxsize=1024)
def plan_adapter_layout(
    blocks: tuple[AdapterBlock, ...], model: ModelSpec, *, page_bytes: int, itemsize: int
) -> AdapterLayout:
    """Packs ``blocks`` into pages of ``page_bytes``, ``itemsize`` bytes an element; first page that has room.

    Raises BadAdapter when a block does not fit the model, BadConfig when one rank of it exceeds a page.
    """
    placed: list[PlacedBlock] = []
    site_ranks: dict[int, int] = {}
    for block in sorted(blocks, key=lambda block: (block.layer, *_site_of(block.module))):
        if not 0 <= block.layer < model.num_layers or block.lora_rank < 1:
            raise BadAdapter(f"layer {block.layer} {block.module} of rank {block.lora_rank} does not fit the base")
        index, _ = _site_of(block.module)
        site = block.layer * len(SITES) + index
        rank_start = site_ranks.get(site, 0)
        site_ranks[site] = rank_start + _padded(block.lora_rank)
        placed.append(PlacedBlock(block=block, site=site, rank_start=rank_start))
    packer = _Packer(page_bytes, itemsize)
    parts: list[AdapterPart] = []
    of_block: dict[PlacedBlock, tuple[AdapterPart, ...]] = {}
    for site, lora_rank in site_ranks.items():
        members = [item for item in placed if item.site == site]
        in_features, _ = model.projection_shape(members[0].block.module)
        ends = [item.rank_start for item in members[1:]] + [lora_rank]
        a_parts = packer.place(site, None, [0, *ends], in_features)
        parts += a_parts
        for item, rank_end in zip(members, ends, strict=True):
            _, out_features = model.projection_shape(item.block.module)
            b_parts = packer.place(site, item, [item.rank_start, rank_end], out_features)
            parts += b_parts
            shared = (part for part in a_parts if part.rank_start < rank_end and part.rank_end > item.rank_start)
            of_block[item] = (*shared, *b_parts)
    return AdapterLayout(
        num_pages=max(packer.num_pages, 1),
        blocks=tuple(placed),
        parts=tuple(parts),
        block_parts=tuple(of_block[item] for item in placed),
        site_ranks=tuple(site_ranks.items()),
    )


def plan_shard_layout(
    blocks: tuple[AdapterBlock, ...], shard: Shard, *, page_bytes: int, itemsize: int
) -> AdapterLayout:
    """Where the rank's part of the adapter's matrices lies; ``page_bytes`` are the rank's. Ranks may need fewer pages
    than others, but all of them one: the engine gives the same pages to all.

    Raises BadAdapter when a block does not fit the model, BadConfig when one rank of it exceeds a page.
    """
    for block in blocks:
        if block.layer >= shard.model.num_layers:
            raise BadAdapter(f"layer {block.layer} {block.module} of rank {block.lora_rank} does not fit the base")
    return plan_adapter_layout(shard.blocks(blocks), shard.local, page_bytes=page_bytes, itemsize=itemsize)


def _padded(lora_rank: int) -> int:
    return -(-lora_rank // _RANK_MULTIPLE) * _RANK_MULTIPLE


class _Packer:
    """First fit over the pages opened so far."""

    def __init__(self, page_bytes: int, itemsize: int) -> None:
        self._page_bytes = page_bytes
        self._itemsize = itemsize
        self._used_bytes: list[int] = []

    @property
    def num_pages(self) -> int:
        return len(self._used_bytes)

    def place(
        self, site: int, placed: PlacedBlock | None, bounds: Sequence[int], num_columns: int
    ) -> list[AdapterPart]:
        """One part, or several where all rows, from the first of ``bounds`` to the last, exceed a page. They are cut at
        one of ``bounds`` where that is possible."""
        row_bytes = num_columns * self._itemsize
        max_ranks = self._page_bytes // row_bytes
        if max_ranks < 1:
            raise BadConfig(
                f"one LoRA rank of {num_columns} features takes {row_bytes} bytes, more than a page "
                f"({self._page_bytes}): raise page_size",
                param="page_size",
            )
        if max_ranks > _RANK_MULTIPLE:
            max_ranks -= max_ranks % _RANK_MULTIPLE
        parts = []
        start = bounds[0]
        while start < bounds[-1]:
            end = max((bound for bound in bounds if start < bound <= start + max_ranks), default=start + max_ranks)
            page, offset_bytes = self._reserve((end - start) * row_bytes)
            parts.append(
                AdapterPart(
                    site=site,
                    placed=placed,
                    rank_start=start,
                    rank_end=end,
                    num_columns=num_columns,
                    page=page,
                    offset_bytes=offset_bytes,
                )
            )
            start = end
        return parts

    def _reserve(self, num_bytes: int) -> tuple[int, int]:
        """(page, offset) of ``num_bytes`` (at most a page)."""
        for page, used in enumerate(self._used_bytes):
            offset = -(-used // _ALIGN_BYTES) * _ALIGN_BYTES
            if offset + num_bytes <= self._page_bytes:
                self._used_bytes[page] = offset + num_bytes
                return page, offset
        self._used_bytes.append(num_bytes)
        return len(self._used_bytes) - 1, 0


def _site_of(module: str) -> tuple[int, int]:
    """(index in SITES, index in the site). BadAdapter for an unknown module."""
    for index, modules in enumerate(SITES):
        if module in modules:
            return index, modules.index(module)
    raise BadAdapter(f"projection {module!r} cannot carry LoRA")
