"""A StepPlan as device tensors for the Triton kernels: what is the same for all layers of one step.

Uploads the host arrays of a step in one copy: padded to a bucket and at fixed addresses, so that a captured graph finds
them, or as they are where the step is too large for a graph. Owns the page tables and the tokens sampled last. Called
by the executor. Legend: T tokens, B rows, S slots.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import torch
from loraplex_kernels import KvLayout
from loraplex_kernels.gpu.attention import decode_blocks, prefill_block_tokens
from loraplex_kernels.gpu.attention_tiles import PART_FIELDS, DecodeCut, build_decode_parts, decode_concurrency
from loraplex_kernels.gpu.lora import ALL_SITES, ATTENTION_SITES, MAX_RANK, LoraTiles, Site
from loraplex_kernels.gpu.lora_tiles import TileArrays, decode_tile_rows, mixed_tile_rows, shared_tiles

from loraplex.core.model import ModelSpec
from loraplex.core.step import Row
from loraplex.model_runner.gpu.adapters import Arrival, GpuAdapters
from loraplex.model_runner.gpu.buckets import (
    MAX_SEVERAL,
    MixedBucket,
    bucket_of,
    decode_tile_buckets,
    mixed_tile_buckets,
    mixed_token_buckets,
    row_buckets,
    single_buckets,
)
from loraplex.model_runner.gpu.host_step import (
    DECODE_TILE_ROWS,
    AdapterRuns,
    Ints,
    MixedArrays,
)
from loraplex.model_runner.gpu.page_tables import PageTables
from loraplex.model_runner.gpu.upload import FixedSections, upload_sections

_FALLBACK_SMS = 8
"""Where there is no GPU to ask: the interpreter."""

_INVARIANT_PARTS = 4
"""Of each row in batch-invariant steps: few enough for many rows, enough for one row with a long context."""

_RANK_CAPS = (16, MAX_RANK)
_SINGLE_ROW_RANK_CAPS = (8, *_RANK_CAPS)
_WARM_CLOSELY_TOKENS, _WARM_TOKENS = 512, 1024
"""Of steps with prompts: up to the first graphs of each kind exist from the start, up to the second fewer that serve
the others, of longer ones one for each kind of adapters."""
_COARSE = 3
"""Of the tile buckets of adapters of many ranks every third is captured ahead: two and a half times the tiles."""


class StepKey(NamedTuple):
    """Sizes of a step that runs as a graph; never which adapters."""

    num_tokens: int
    num_singles: int | None
    """None: a decode step."""
    num_tiles: int
    """0: without adapters."""
    rank_cap: int
    max_planes: int
    sites: frozenset[Site]

    @classmethod
    def of(cls, num_tokens: int, num_singles: int | None, lora: LoraTiles | None) -> Self:
        if lora is None:
            return cls(num_tokens, num_singles, 0, 0, 0, frozenset())
        return cls(num_tokens, num_singles, lora.num_tiles, lora.rank_cap, lora.max_planes, lora.sites)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceStep:
    """Inputs of one forward pass; int32 device tensors."""

    token_ids: torch.Tensor
    """(T,); PENDING: the token that the slot sampled last."""
    token_slot: torch.Tensor
    """(T,), -1 for padding."""
    position: torch.Tensor
    """(T,)"""
    decode: torch.Tensor | None
    """(parts, PART_FIELDS) from ``build_decode_parts``: the rows of one token."""
    prefill: torch.Tensor | None
    """(tiles, 4) from ``build_prefill_tiles``: the rows of several tokens."""
    lora: LoraTiles | None
    sampled: torch.Tensor | None
    """(B,) tokens after which one is drawn; None: all of them."""
    num_sampled: int
    arrivals: tuple[Arrival, ...] = ()
    key: StepKey | None = None
    """Of the captured graph. None: the step runs eagerly."""


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
        max_step_tokens: int,
        padded: bool,
        batch_invariant: bool,
    ) -> None:
        """``padded``: small steps with prompts take the sizes of a bucket, for graphs. ``batch_invariant``: one height
        of LoRA tiles and one rank cap for all steps."""
        self._device = device
        self._padded = padded
        self._adapters = adapters
        self._prefill_block = prefill_block_tokens(layout, model.num_heads, dtype)
        self._batch_invariant = batch_invariant
        self._rank_caps = (MAX_RANK,) if batch_invariant else _RANK_CAPS
        self._max_rows = max_rows
        self.decode_cut = DecodeCut(
            block_keys=decode_blocks(layout, dtype).keys,
            concurrency=decode_concurrency(layout.num_kv_heads, _num_sms(device)),
            window=model.sliding_window,
            per_row=_INVARIANT_PARTS if batch_invariant else None,
        )
        parts = PART_FIELDS * self.decode_cut.capacity(max_rows)
        self.page_tables = PageTables(max_rows, -(-model.max_context_tokens // layout.page_size), device)
        self.last_token = torch.zeros(max_rows, dtype=torch.int32, device=device)
        """(S,)"""
        self._row_buckets = row_buckets(max_rows)
        # Token ids, slots, positions; parts of contexts; record, row, count, planes of tiles; records of tokens.
        self._decode = FixedSections([max_rows] * 3 + [parts] + [max_rows] * 5, device)
        self._token_buckets = mixed_token_buckets(max_step_tokens)
        most = self._token_buckets[-1]
        tiles = max(self._tile_buckets(MixedBucket(tokens, max_rows))[-1] for tokens in self._token_buckets)
        # As MixedArrays.sections, then tiles and records of tokens.
        self._mixed = FixedSections(
            [most] * 3 + [max_rows + MAX_SEVERAL] + [parts] + [4 * self._prefill_capacity(most)] + [tiles] * 4 + [most],
            device,
        )

    def decode(self, rows: Sequence[Row]) -> DeviceStep:
        """Every row holds one token and samples. Conflict: an adapter is not loaded."""
        runs = AdapterRuns(rows, self._adapters)
        num_rows = bucket_of(len(rows), self._row_buckets)
        fields = np.zeros((3, num_rows), dtype=np.int32)
        fields[1] = -1
        live = fields[:, : len(rows)]
        live[0] = [row.token_ids[0] for row in rows]
        live[1] = [row.slot for row in rows]
        live[2] = [row.start for row in rows]
        ids, slots, positions = fields
        # Padding has a slot of -1 and sees no key.
        parts = build_decode_parts(positions + (slots >= 0), np.arange(num_rows), slots, self.decode_cut)
        sections: list[Ints] = [ids, slots, positions, parts.reshape(-1)]
        num_tiles = 0
        if runs.digests:
            tiles, num_tiles = self._decode_tiles(runs, len(rows), num_rows)
            sections += [*tiles.fields, tiles.token_record]
        self._decode.send(sections)
        return self._decode_step(num_rows, num_tiles, runs)

    def _decode_tiles(self, runs: AdapterRuns, num_live: int, num_rows: int) -> tuple[TileArrays, int]:
        """Of ``num_live`` rows padded to ``num_rows``; and how many tiles the step visits, one of its buckets."""
        row_tokens, num_padding = np.ones(num_live, dtype=np.int32), num_rows - num_live
        tiles = runs.tiles(row_tokens, num_padding, DECODE_TILE_ROWS)
        buckets = self._decode_tile_buckets(num_rows)
        if self._batch_invariant or decode_tile_rows(num_rows, tiles.num_live) == DECODE_TILE_ROWS:
            return tiles, bucket_of(tiles.num_live, buckets)
        return runs.tiles(row_tokens, num_padding, 1), num_rows

    def _decode_tile_buckets(self, num_rows: int) -> tuple[int, ...]:
        """The last: a tile for each row, of one row unless all steps have tiles of one height."""
        most = num_rows if self._batch_invariant else shared_tiles(num_rows)
        return (*decode_tile_buckets(num_rows, DECODE_TILE_ROWS, most), num_rows)

    def mixed(self, rows: Sequence[Row]) -> DeviceStep:
        """Any rows. Conflict: an adapter is not loaded."""
        runs = AdapterRuns(rows, self._adapters)
        arrays = MixedArrays.of(rows, self._prefill_block, self.decode_cut)
        if self._padded and arrays.num_tokens <= self._token_buckets[-1] and arrays.num_several <= MAX_SEVERAL:
            bucket = MixedBucket(
                bucket_of(arrays.num_tokens, self._token_buckets),
                bucket_of(arrays.num_singles, single_buckets(self._max_rows)),
            )
            sections = arrays.padded_sections(bucket.num_tokens)
            num_tiles = 0
            if runs.digests:
                tile_rows = self._mixed_tile_rows(bucket.num_tokens)
                tiles = runs.tiles(arrays.row_tokens, bucket.num_tokens - arrays.num_tokens, tile_rows)
                num_tiles = bucket_of(tiles.num_live, self._tile_buckets(bucket))
                sections += [*tiles.fields, tiles.token_record]
            self._mixed.send(sections)
            return self._mixed_step(bucket, num_tiles, runs)
        sections = arrays.sections()
        num_tiles, tile_rows = 0, self._mixed_tile_rows(arrays.num_tokens)
        if runs.digests:
            tiles = runs.tiles(arrays.row_tokens, 0, tile_rows)
            num_tiles = tiles.num_live
            sections += [*tiles.fields, tiles.token_record]
        views = upload_sections(sections, self._device)
        return DeviceStep(
            token_ids=views[0],
            token_slot=views[1],
            position=views[2],
            decode=views[4].view(-1, PART_FIELDS) if arrays.num_singles else None,
            prefill=views[5].view(-1, 4) if arrays.num_several else None,
            lora=self._tiles(views[6:], num_tiles, tile_rows, runs) if runs.digests else None,
            sampled=views[3],
            num_sampled=len(arrays.sampled),
            arrivals=tuple(self._adapters.arrivals(runs.digests)),
        )

    def idle_steps(self) -> Iterator[DeviceStep]:
        """Steps of padding alone, one for each graph that is to exist before it is needed: adapters of up to 16 ranks
        on any projection; in tiles of one row also less, which saves most there; of more ranks some that serve all
        others, but for steps with ranks above 64 and with more than ``MAX_SEVERAL`` prompts."""
        none = AdapterRuns((), self._adapters)
        widest, most, *less = (
            AdapterRuns((), self._adapters, at_least=sites, max_rank=max_rank)
            for sites, max_rank in (
                (ALL_SITES, MAX_RANK),
                (ALL_SITES, 16),
                (ALL_SITES, 8),
                (ATTENTION_SITES, 16),
                (ATTENTION_SITES, 8),
            )
        )
        self._decode.send([np.full(self._max_rows, value, dtype=np.int32) for value in (0, -1)])
        for num_rows in self._row_buckets:
            yield self._decode_step(num_rows, 0, none)
            for num_tiles in self._decode_tile_buckets(num_rows):
                yield self._decode_step(num_rows, num_tiles, most)
            if not self._batch_invariant:
                yield from (self._decode_step(num_rows, num_rows, runs) for runs in less)
                *shared, single = self._decode_tile_buckets(num_rows)
                for num_tiles in (*shared[::-_COARSE], single):
                    yield self._decode_step(num_rows, num_tiles, widest)
        empty = MixedArrays.of((), self._prefill_block, self.decode_cut)
        singles = single_buckets(self._max_rows)
        kinds = (widest,) if self._batch_invariant else (most, widest)
        for num_tokens in self._token_buckets:
            self._mixed.send(empty.padded_sections(num_tokens))
            if num_tokens > _WARM_TOKENS:
                for num_singles in dict.fromkeys((singles[1], singles[-1])):
                    bucket = MixedBucket(num_tokens, num_singles)
                    tiles = self._tile_buckets(bucket)
                    num_tiles = tiles[-1] if num_singles == self._max_rows else tiles[:2][-1]
                    yield self._mixed_step(bucket, 0, none)
                    yield from (self._mixed_step(bucket, num_tiles, runs) for runs in kinds)
                continue
            for num_singles in singles if num_tokens <= _WARM_CLOSELY_TOKENS else singles[-2:]:
                bucket = MixedBucket(num_tokens, num_singles)
                tiles = self._tile_buckets(bucket)
                yield self._mixed_step(bucket, 0, none)
                if self._batch_invariant or num_singles in singles[:2]:
                    yield self._mixed_step(bucket, tiles[0], most)
                if num_singles == self._max_rows:
                    yield self._mixed_step(bucket, tiles[-1], widest)
                elif not self._batch_invariant:
                    yield self._mixed_step(bucket, tiles[:2][-1], widest)

    def wider(self, step: DeviceStep) -> Iterator[StepKey]:
        """Keys of the graphs that compute the step, and with it rows of one token, tiles, ranks or projections that it
        does not have, the closest first. Its inputs serve them as they are."""
        key, lora = step.key, step.lora
        if key is None:
            return
        keys = [key]
        if key.num_singles is not None:
            keys = [key._replace(num_singles=n) for n in single_buckets(self._max_rows) if n >= key.num_singles]
        if lora is None:
            yield from keys
            return
        caps = self._caps(lora.tile_rows)
        for other in keys:
            tiles = [num_tiles for num_tiles in self._buckets_of_tiles(other) if num_tiles >= lora.num_tiles]
            for rank_cap in caps[caps.index(lora.rank_cap) :]:
                for sites in dict.fromkeys((lora.sites, ALL_SITES)):
                    yield from (other._replace(num_tiles=n, rank_cap=rank_cap, sites=sites) for n in tiles)

    def _buckets_of_tiles(self, key: StepKey) -> tuple[int, ...]:
        """That steps of these sizes may have, with tiles of the same height."""
        if key.num_singles is not None:
            return self._tile_buckets(MixedBucket(key.num_tokens, key.num_singles))
        buckets = self._decode_tile_buckets(key.num_tokens)
        if self._batch_invariant:
            return buckets
        return buckets[-1:] if key.num_tiles == key.num_tokens else buckets[:-1]

    def _decode_step(self, num_rows: int, num_tiles: int, runs: AdapterRuns) -> DeviceStep:
        ids, slots, positions, parts, *tile_views = self._decode.views
        single_rows = num_tiles == num_rows and not self._batch_invariant
        lora = self._tiles(tile_views, num_tiles, 1 if single_rows else DECODE_TILE_ROWS, runs) if num_tiles else None
        return DeviceStep(
            token_ids=ids[:num_rows],
            token_slot=slots[:num_rows],
            position=positions[:num_rows],
            decode=self._decode_parts(parts, num_rows),
            prefill=None,
            lora=lora,
            sampled=None,
            num_sampled=num_rows,
            arrivals=tuple(self._adapters.arrivals(runs.digests)),
            key=StepKey.of(num_rows, None, lora),
        )

    def _mixed_step(self, bucket: MixedBucket, num_tiles: int, runs: AdapterRuns) -> DeviceStep:
        ids, token_slots, positions, sampled, parts, prefill, *tile_views = self._mixed.views
        num_tokens, singles = bucket.num_tokens, bucket.num_singles
        lora = self._tiles(tile_views, num_tiles, self._mixed_tile_rows(num_tokens), runs) if num_tiles else None
        return DeviceStep(
            token_ids=ids[:num_tokens],
            token_slot=token_slots[:num_tokens],
            position=positions[:num_tokens],
            decode=self._decode_parts(parts, singles) if singles else None,
            prefill=prefill[: 4 * self._prefill_capacity(num_tokens)].view(-1, 4),
            lora=lora,
            sampled=sampled[: bucket.num_sampled],
            num_sampled=bucket.num_sampled,
            arrivals=tuple(self._adapters.arrivals(runs.digests)),
            key=StepKey.of(num_tokens, singles, lora),
        )

    def _decode_parts(self, section: torch.Tensor, num_rows: int) -> torch.Tensor:
        return section[: PART_FIELDS * self.decode_cut.capacity(num_rows)].view(-1, PART_FIELDS)

    def _prefill_capacity(self, num_tokens: int) -> int:
        return -(-num_tokens // self._prefill_block) + MAX_SEVERAL

    def _tile_buckets(self, bucket: MixedBucket) -> tuple[int, ...]:
        return mixed_tile_buckets(bucket, self._max_rows, self._mixed_tile_rows(bucket.num_tokens))

    def _mixed_tile_rows(self, num_tokens: int) -> int:
        """Of a step of ``num_tokens`` or, as a graph, padded to them."""
        return DECODE_TILE_ROWS if self._batch_invariant else mixed_tile_rows(num_tokens)

    def _tiles(self, views: Sequence[torch.Tensor], num_tiles: int, tile_rows: int, runs: AdapterRuns) -> LoraTiles:
        record, row, count, planes, token_record = views
        assert num_tiles <= len(record), "kernels would read behind the end"
        return LoraTiles(
            record=record,
            row=row,
            count=count,
            planes=planes,
            token_record=token_record,
            num_tiles=num_tiles,
            tile_rows=tile_rows,
            rank_cap=bucket_of(runs.max_rank, self._caps(tile_rows)),
            max_planes=runs.max_planes,
            sites=runs.sites,
        )

    def _caps(self, tile_rows: int) -> tuple[int, ...]:
        return _SINGLE_ROW_RANK_CAPS if tile_rows == 1 else self._rank_caps


def _num_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return _FALLBACK_SMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
