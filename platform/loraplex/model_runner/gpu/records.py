"""Where the LoRA kernels find an adapter: entries of the table, computed from its layout and its pages.

An entry names one block (rank rows of A or of B, dense) by its offset in the arena and its rank. A record holds the
entries of all layers and projections; an adapter takes one record (plane) for each 64 ranks, and more where its blocks
are cut into pages. Pure; called by ``adapters``. Legend: L layers, E = L * 7 entries of a record, N planes.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from loraplex_kernels.gpu.lora import MAX_RANK, Site

from loraplex.core.errors import BadConfig
from loraplex.core.model import LORA_MODULES, ModelSpec
from loraplex.model_runner.adapter_layout import AdapterLayout, AdapterPart, PlacedBlock

ENTRY_ALIGN = 8
"""Offsets count in units of so many elements, ranks likewise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordPlan:
    """One row for each (plane, entry) that holds a block; ``side`` 0 is A, 1 is B."""

    num_planes: int
    max_rank: int
    """Largest rank of one plane."""
    plane: npt.NDArray[np.int64]
    entry: npt.NDArray[np.int64]
    rank: npt.NDArray[np.int64]
    page: npt.NDArray[np.int64]
    """(rows, 2): index into the adapter's pages of A and of B."""
    offset: npt.NDArray[np.int64]
    """(rows, 2): elements from the start of that page."""
    sites: frozenset[Site]
    """That hold a block in any layer."""

    def entries(self, pages: tuple[int, ...], *, page_elements: int, entries_per_record: int) -> npt.NDArray[np.int64]:
        """(N, E, 2) packed entries for an adapter that lies in ``pages``; 0 where it has no block."""
        packed = np.zeros((self.num_planes, entries_per_record, 2), dtype=np.int64)
        first = np.asarray(pages, dtype=np.int64)[self.page] * page_elements + self.offset
        packed[self.plane, self.entry] = (first // ENTRY_ALIGN << 8) | (self.rank // ENTRY_ALIGN)[:, None]
        return packed


def plan_records(layout: AdapterLayout, model: ModelSpec, *, itemsize: int) -> RecordPlan:
    """One empty record for an adapter without blocks: it may be for other stages alone. Raises BadConfig when pages are
    so small that a block is cut between multiples of 8 ranks."""
    by_site: dict[int, list[AdapterPart]] = {}
    by_block: dict[PlacedBlock, list[AdapterPart]] = {}
    for part in layout.parts:
        if part.placed is None:
            by_site.setdefault(part.site, []).append(part)
        else:
            by_block.setdefault(part.placed, []).append(part)
    rows: list[tuple[int, int, int, tuple[int, int], tuple[int, int]]] = []
    for placed, b_parts in by_block.items():
        entry = placed.block.layer * len(LORA_MODULES) + LORA_MODULES.index(placed.block.module)
        start, end = b_parts[0].rank_start, b_parts[-1].rank_end
        a_parts = [part for part in by_site[placed.site] if part.rank_start < end and part.rank_end > start]
        cuts = {start, end, *(c for part in (*a_parts, *b_parts) for c in (part.rank_start, part.rank_end))}
        inner = sorted(cut for cut in cuts if start <= cut <= end)
        plane = 0
        for first, last in pairwise(inner):
            for rank_start in range(first, last, MAX_RANK):
                rank = min(MAX_RANK, last - rank_start)
                if rank % ENTRY_ALIGN:
                    raise BadConfig("a page holds less than 8 LoRA ranks: raise page_size", param="page_size")
                a_at, b_at = _locate(a_parts, rank_start, itemsize), _locate(b_parts, rank_start, itemsize)
                rows.append((plane, entry, rank, (a_at[0], b_at[0]), (a_at[1], b_at[1])))
                plane += 1
    return RecordPlan(
        num_planes=1 + max((row[0] for row in rows), default=0),
        max_rank=max((row[2] for row in rows), default=0),
        plane=np.array([row[0] for row in rows], dtype=np.int64),
        entry=np.array([row[1] for row in rows], dtype=np.int64),
        rank=np.array([row[2] for row in rows], dtype=np.int64),
        page=np.array([row[3] for row in rows], dtype=np.int64).reshape(-1, 2),
        offset=np.array([row[4] for row in rows], dtype=np.int64).reshape(-1, 2),
        sites=frozenset(Site.of_module(row[1] % len(LORA_MODULES)) for row in rows),
    )


def _locate(parts: list[AdapterPart], rank: int, itemsize: int) -> tuple[int, int]:
    """(index of the page, element offset in it) of row ``rank`` of a stacked matrix."""
    part = next(part for part in parts if part.rank_start <= rank < part.rank_end)
    return part.page, part.offset_bytes // itemsize + (rank - part.rank_start) * part.num_columns
