"""A StepPlan as host arrays: int32, vectorised, in the order of the plan's rows. Pure; called by ``inputs``.

Legend: T tokens, B rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Self

import numpy as np
import numpy.typing as npt
from loraplex_kernels.gpu.attention_tiles import DecodeCut, build_decode_parts, build_prefill_tiles
from loraplex_kernels.gpu.lora import ALL_SITES, ATTENTION_SITES, Site
from loraplex_kernels.gpu.lora_tiles import TileArrays, build_tiles

from loraplex.core.ids import Digest
from loraplex.core.step import Row
from loraplex.model_runner.gpu.adapters import GpuAdapters

DECODE_TILE_ROWS = 16

Ints = npt.NDArray[np.int32]


class AdapterRuns:
    """Which record each row runs through."""

    def __init__(
        self,
        rows: Sequence[Row],
        adapters: GpuAdapters,
        *,
        at_least: frozenset[Site] = ATTENTION_SITES,
        max_rank: int = 0,
    ) -> None:
        """``at_least``, ``max_rank``: as if some adapter had these projections, and this rank. Conflict when an adapter
        is not loaded."""
        self.record: Ints = np.full(len(rows), -1, dtype=np.int32)
        self.planes: Ints = np.zeros(len(rows), dtype=np.int32)
        self.digests: list[Digest] = []
        self.max_rank = max_rank
        self.max_planes = 1
        sites = set(at_least)
        start = 0
        for digest, run in groupby(row.adapter for row in rows):
            end = start + sum(1 for _ in run)
            if digest is not None:
                adapter = adapters.get(digest)
                self.digests.append(digest)
                self.record[start:end] = adapter.record
                self.planes[start:end] = adapter.num_planes
                self.max_rank = max(self.max_rank, adapter.max_rank)
                self.max_planes = max(self.max_planes, adapter.num_planes)
                sites |= adapter.sites
            start = end
        self.sites = ATTENTION_SITES if sites <= ATTENTION_SITES else ALL_SITES
        """Where these adapters may have something: one of two sets, so that graphs with LoRA at most double."""

    def tiles(self, row_tokens: Ints, num_padding: int, tile_rows: int) -> TileArrays:
        """Tiles of all tokens; padding is one more run without an adapter."""
        if num_padding == 0:
            return build_tiles(self.record, self.planes, row_tokens, tile_rows)
        return build_tiles(
            np.append(self.record, np.int32(-1)),
            np.append(self.planes, np.int32(0)),
            np.append(row_tokens, np.int32(num_padding)),
            tile_rows,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedArrays:
    """Rows of any length."""

    row_tokens: Ints
    """(B,)"""
    token_ids: Ints
    """(T,), and so are the next two."""
    token_slot: Ints
    position: Ints
    sampled: Ints
    """Tokens after which one is drawn."""
    decode_parts: Ints
    """(parts, PART_FIELDS) of the rows of one token."""
    num_singles: int
    """How many rows that are."""
    prefill_tiles: Ints
    """(tiles, 4) of the rows of several tokens."""
    num_several: int
    """How many rows that are."""

    @classmethod
    def of(cls, rows: Sequence[Row], prefill_block: int, cut: DecodeCut) -> Self:
        """``prefill_block``: query tokens of a tile of ``prefill_attention``."""
        counts = np.array([len(row.token_ids) for row in rows], dtype=np.int32)
        starts = np.array([row.start for row in rows], dtype=np.int32)
        slots = np.array([row.slot for row in rows], dtype=np.int32)
        samples = np.array([row.samples for row in rows], dtype=np.bool_)
        first_tokens = (np.cumsum(counts) - counts).astype(np.int32)
        token_ids = np.fromiter((token for row in rows for token in row.token_ids), np.int32, int(counts.sum()))
        # Positions of a row are consecutive: its start, plus how far the token lies behind the row's first.
        within = np.arange(len(token_ids), dtype=np.int32) - np.repeat(first_tokens, counts)
        single = counts == 1
        several = ~single
        return cls(
            row_tokens=counts,
            token_ids=token_ids,
            token_slot=np.repeat(slots, counts),
            position=np.repeat(starts, counts) + within,
            sampled=(first_tokens + counts - 1)[samples],
            decode_parts=build_decode_parts(starts[single] + 1, first_tokens[single], slots[single], cut),
            num_singles=int(single.sum()),
            prefill_tiles=build_prefill_tiles(
                starts[several], counts[several], first_tokens[several], slots[several], prefill_block
            ),
            num_several=int(several.sum()),
        )

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def sections(self) -> list[Ints]:
        """In the order in which ``inputs`` lays them out."""
        return [
            self.token_ids,
            self.token_slot,
            self.position,
            self.sampled,
            self.decode_parts.reshape(-1),
            self.prefill_tiles.reshape(-1),
        ]

    def padded_sections(self, num_tokens: int) -> list[Ints]:
        """The same for graphs of ``num_tokens``: padding does nothing but take part in the GEMMs."""
        sections = self.sections()
        sections[1] = np.pad(self.token_slot, (0, num_tokens - self.num_tokens), constant_values=-1)
        return sections
