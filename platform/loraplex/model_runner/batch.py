"""A StepPlan as tensors: what the decoder needs of one step, the same for all layers.

Pure but for the upload; knows pages and segments, not weights. Called by the executor.
Legend: T tokens of the step, B rows that sample, C = 2 * KV heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from loraplex_kernels import (
    AttentionPlan,
    AttentionRow,
    KvLayout,
    LoraSegment,
    LoraSite,
    RotaryAngles,
    kv_row_index,
    plan_attention,
    rotary_angles,
)

from loraplex.core.ids import Digest
from loraplex.core.model import ModelSpec
from loraplex.core.step import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    token_ids: torch.Tensor
    """(T,) int64."""
    angles: RotaryAngles
    kv_rows: torch.Tensor
    """(T, C) int64: where layer 0 of each token goes."""
    attention: AttentionPlan
    segments: tuple[LoraSegment, ...]
    sampled: torch.Tensor | None
    """(B,) int64 tokens after which one is drawn; None when that is every token of the step."""
    num_sampled: int
    fresh_pages: torch.Tensor | None
    """(n,) int64 pages whose first slot is written in this step."""


def build_batch(
    rows: Sequence[Row],
    model: ModelSpec,
    layout: KvLayout,
    *,
    sites: Callable[[Digest], Sequence[LoraSite | None]],
    frequencies: torch.Tensor,
    dtype: torch.dtype,
) -> StepBatch:
    """``rows``: at least one. ``sites`` gives the loaded weights of an adapter; ``frequencies`` (head_dim / 2,)."""
    device = frequencies.device
    page_size = layout.page_size
    token_ids: list[int] = []
    positions: list[int] = []
    pages: list[int] = []
    fresh: list[int] = []
    sampled: list[int] = []
    attention_rows: list[AttentionRow] = []
    for row in rows:
        end = row.start + len(row.token_ids)
        assert len(row.pages) * page_size >= end, f"slot {row.slot}: the page table ends before position {end}"
        attention_rows.append(
            AttentionRow(first_token=len(token_ids), num_tokens=len(row.token_ids), start=row.start, pages=row.pages)
        )
        token_ids.extend(row.token_ids)
        positions.extend(range(row.start, end))
        pages.extend(row.pages[position // page_size] for position in range(row.start, end))
        fresh.extend(row.pages[-(-row.start // page_size) : (end - 1) // page_size + 1])
        if row.samples:
            sampled.append(len(token_ids) - 1)
    # One upload for everything that has a value per token.
    ids_T, positions_T, pages_T = torch.tensor([token_ids, positions, pages], device=device).unbind(0)
    return StepBatch(
        token_ids=ids_T,
        angles=rotary_angles(positions_T, frequencies, dtype),
        kv_rows=kv_row_index(layout, pages_T, positions_T % page_size),
        attention=plan_attention(
            attention_rows,
            layout=layout,
            num_heads=model.num_heads,
            sliding_window=model.sliding_window,
            dtype=dtype,
            device=device,
        ),
        segments=_segments(rows, sites),
        sampled=None if len(sampled) == len(token_ids) else torch.tensor(sampled, dtype=torch.int64, device=device),
        num_sampled=len(sampled),
        fresh_pages=torch.tensor(fresh, device=device) if fresh else None,
    )


def _segments(rows: Sequence[Row], sites: Callable[[Digest], Sequence[LoraSite | None]]) -> tuple[LoraSegment, ...]:
    segments = []
    start = 0
    for adapter, run in groupby(rows, key=lambda row: row.adapter):
        end = start + sum(len(row.token_ids) for row in run)
        if adapter is not None:
            segments.append(LoraSegment(start=start, end=end, sites=sites(adapter)))
        start = end
    return tuple(segments)
