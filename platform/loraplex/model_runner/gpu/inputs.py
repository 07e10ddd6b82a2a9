"""A StepPlan as device tensors for the Triton kernels: what is the same for all layers of one step.

Turns slots, pages and adapters into int32 arrays and uploads them in one copy; decode steps use fixed addresses, so
that a captured graph finds them. Owns the page tables and the tokens sampled last. Called by the executor.
Legend: T tokens, B rows, S slots.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch
from loraplex_kernels import KvLayout
from loraplex_kernels.gpu.attention import build_prefill_tiles, prefill_block_tokens
from loraplex_kernels.gpu.lora import LoraTiles
from loraplex_kernels.gpu.lora_tiles import TileArrays, build_tiles

from loraplex.core.ids import Digest
from loraplex.core.model import ModelSpec
from loraplex.core.step import Row
from loraplex.model_runner.gpu.adapters import Arrival, GpuAdapters
from loraplex.model_runner.gpu.buckets import bucket_of, row_buckets, tile_buckets
from loraplex.model_runner.gpu.page_tables import PageTables
from loraplex.model_runner.gpu.upload import FixedSections, upload_sections

_DECODE_TILE_ROWS = 16
_PREFILL_TILE_ROWS = 64
_RANK_CAPS = (16, 64)

_Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRows:
    """Rows of one token each."""

    tokens: torch.Tensor | None
    """(B,) token of each row; None: token b is row b."""
    slots: torch.Tensor
    """(B,), -1 for padding."""
    context_len: torch.Tensor
    """(B,) keys to attend to, the row's own included; 0 for padding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceStep:
    """Inputs of one forward pass; int32 device tensors."""

    token_ids: torch.Tensor
    """(T,); PENDING: the token that the slot sampled last."""
    token_slot: torch.Tensor
    """(T,), -1 for padding."""
    position: torch.Tensor
    """(T,)"""
    decode: DecodeRows | None
    prefill: torch.Tensor | None
    """(tiles, 4) from ``build_prefill_tiles``: the rows of several tokens."""
    lora: LoraTiles | None
    sampled: torch.Tensor | None
    """(B,) tokens after which one is drawn; None: all of them."""
    num_sampled: int
    arrivals: tuple[Arrival, ...] = ()
    key: Hashable = None
    """Of the captured graph: sizes alone, never which adapters."""


class StepInputs:
    def __init__(
        self,
        model: ModelSpec,
        layout: KvLayout,
        dtype: torch.dtype,
        *,
        device: torch.device,
        adapters: GpuAdapters,
        max_rows: int,
        batch_invariant: bool,
    ) -> None:
        self._device = device
        self._adapters = adapters
        self._prefill_block = prefill_block_tokens(layout, model.num_heads, dtype)
        self._batch_invariant = batch_invariant
        self.page_tables = PageTables(max_rows, -(-model.max_context_tokens // layout.page_size), device)
        self.last_token = torch.zeros(max_rows, dtype=torch.int32, device=device)
        """(S,)"""
        self.row_buckets = row_buckets(max_rows)
        # Token ids, slots, positions, context lengths; record, row, count, planes of tiles; records of tokens.
        self._fixed = FixedSections([max_rows] * 9, device)

    def decode(self, rows: Sequence[Row]) -> DeviceStep:
        """Every row holds one token and samples. Padded to a bucket, at fixed addresses. Conflict: not loaded."""
        runs = _Runs(rows, self._adapters)
        num_rows = bucket_of(len(rows), self.row_buckets)
        fields = np.zeros((4, num_rows), dtype=np.int32)
        fields[1] = -1
        live = fields[:, : len(rows)]
        live[0] = [row.token_ids[0] for row in rows]
        live[1] = [row.slot for row in rows]
        live[2] = [row.start for row in rows]
        live[3] = live[2] + 1
        if not runs.digests:
            self._fixed.send(list(fields))
            return self._decode_step(num_rows, 0, None)
        # Padding is one more run of rows without an adapter.
        num_padding = num_rows - len(rows)
        tiles = build_tiles(
            np.pad(runs.record, (0, num_padding), constant_values=-1),
            np.pad(runs.planes, (0, num_padding)),
            np.ones(num_rows, dtype=np.int32),
            _DECODE_TILE_ROWS,
        )
        self._fixed.send([*fields, *tiles.fields, tiles.token_record])
        return self._decode_step(num_rows, bucket_of(tiles.num_live, self.tile_buckets(num_rows)), runs)

    def tile_buckets(self, num_rows: int) -> tuple[int, ...]:
        """Of LoRA tiles in a decode step that is padded to ``num_rows``."""
        return tile_buckets(num_rows, _DECODE_TILE_ROWS)

    def idle_decode(self, num_rows: int, num_tiles: int) -> DeviceStep:
        """A decode step of padding alone, to capture its graph before it is needed. 0 tiles: the base-only graph."""
        fields = np.zeros((4, num_rows), dtype=np.int32)
        fields[1] = -1
        self._fixed.send(list(fields))
        return self._decode_step(num_rows, num_tiles, _Runs((), self._adapters) if num_tiles else None)

    def mixed(self, rows: Sequence[Row]) -> DeviceStep:
        """Any rows. Conflict: an adapter is not loaded."""
        counts = np.array([len(row.token_ids) for row in rows], dtype=np.int32)
        starts = np.array([row.start for row in rows], dtype=np.int32)
        slots = np.array([row.slot for row in rows], dtype=np.int32)
        first_tokens = (np.cumsum(counts) - counts).astype(np.int32)
        token_ids = np.fromiter((token for row in rows for token in row.token_ids), np.int32, int(counts.sum()))
        # Positions of a row are consecutive: its start, plus how far the token lies behind the row's first.
        within = np.arange(len(token_ids), dtype=np.int32) - np.repeat(first_tokens, counts)
        sampled = (first_tokens + counts - 1)[[row.samples for row in rows]]
        sections = [token_ids, np.repeat(slots, counts), np.repeat(starts, counts) + within, sampled]
        single = counts == 1
        sections += [first_tokens[single], slots[single], starts[single] + 1]
        several = ~single
        prefill = build_prefill_tiles(
            starts[several], counts[several], first_tokens[several], slots[several], self._prefill_block
        )
        sections.append(prefill.reshape(-1))
        runs = _Runs(rows, self._adapters)
        tiles: TileArrays | None = None
        if runs.digests:
            tiles = build_tiles(runs.record, runs.planes, counts, _PREFILL_TILE_ROWS)
            sections += [*tiles.fields, tiles.token_record]
        views = upload_sections(sections, self._device)
        return DeviceStep(
            token_ids=views[0],
            token_slot=views[1],
            position=views[2],
            decode=DecodeRows(tokens=views[4], slots=views[5], context_len=views[6]) if single.any() else None,
            prefill=views[7].view(-1, 4) if several.any() else None,
            lora=None if tiles is None else self._tiles(views[8:], tiles.num_live, _PREFILL_TILE_ROWS, runs),
            sampled=views[3],
            num_sampled=len(sampled),
            arrivals=tuple(self._adapters.take_arrivals(runs.digests)),
        )

    def _decode_step(self, num_rows: int, num_tiles: int, runs: "_Runs | None") -> DeviceStep:
        ids, slots, positions, lengths, *tile_views = self._fixed.views
        lora = None if runs is None else self._tiles(tile_views, num_tiles, _DECODE_TILE_ROWS, runs)
        return DeviceStep(
            token_ids=ids[:num_rows],
            token_slot=slots[:num_rows],
            position=positions[:num_rows],
            decode=DecodeRows(tokens=None, slots=slots[:num_rows], context_len=lengths[:num_rows]),
            prefill=None,
            lora=lora,
            sampled=None,
            num_sampled=num_rows,
            arrivals=() if runs is None else tuple(self._adapters.take_arrivals(runs.digests)),
            key=(num_rows,) if lora is None else (num_rows, num_tiles, lora.rank_cap, lora.max_planes),
        )

    def _tiles(self, views: Sequence[torch.Tensor], num_tiles: int, tile_rows: int, runs: "_Runs") -> LoraTiles:
        record, row, count, planes, token_record = views
        return LoraTiles(
            record=record,
            row=row,
            count=count,
            planes=planes,
            token_record=token_record,
            num_tiles=num_tiles,
            tile_rows=tile_rows,
            rank_cap=bucket_of(runs.max_rank, _RANK_CAPS),
            max_planes=runs.max_planes,
            batch_invariant=self._batch_invariant,
        )


class _Runs:
    """Which record each row runs through."""

    def __init__(self, rows: Sequence[Row], adapters: GpuAdapters) -> None:
        """Conflict when an adapter is not loaded."""
        self.record: _Ints = np.full(len(rows), -1, dtype=np.int32)
        self.planes: _Ints = np.zeros(len(rows), dtype=np.int32)
        self.digests: list[Digest] = []
        self.max_rank = 0
        self.max_planes = 1
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
            start = end
