"""Attention over KV pages: prefill chunks with a cached prefix and decode rows, grouped-query, optional sliding window.

``plan_attention`` turns the page tables of a step into index tensors and masks once; ``paged_attention`` uses them in
every layer. Decode rows run as batches of similar length, prefill chunks one by one. Every slot that a mask hides must
hold a finite number (the arena's owner clears a page before its first use): 0 * NaN is NaN.
Called by model_runner. Legend: T tokens, N query heads, G KV heads, Q = N / G, H head dim, B rows of a group,
P pages, S slots of a page, K key positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from loraplex_kernels.kv import KvLayout, KvPages

_MIN_SAVED_PAGES = 16
"""A further decode group must save this many padded pages; its launches cost about as much as they do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRow:
    """Tokens [first_token, first_token + num_tokens) of the step sit at positions [start, ...) of one request."""

    first_token: int
    num_tokens: int
    start: int
    pages: Sequence[int]

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeGroup:
    """One-token rows, padded to the longest of them."""

    tokens: torch.Tensor | None
    """(B,) int64 token of each row; None when the group is the whole step in order."""
    tiles: torch.Tensor
    """(2 * B * G * P,) int64: tiles of layer 0 by (key/value, row, head, page)."""
    bias: torch.Tensor
    """(B * G, 1, K) additive mask in the KV's dtype: 0 or -inf."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillChunk:
    first_token: int
    num_tokens: int
    tiles: torch.Tensor | None
    """(2 * G * P,) int64 by (key/value, head, page); None when all keys are those of the chunk itself."""
    num_keys: int
    """Of the gathered ones; the last page may hold more slots."""
    mask: torch.Tensor | None
    """(T, K) bool, True where a key is seen; None for plain causal from position 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """One step's attention, the same for all layers."""

    num_heads: int
    scale: float
    decode: tuple[DecodeGroup, ...]
    prefill: tuple[PrefillChunk, ...]


def plan_attention(
    rows: Sequence[AttentionRow],
    *,
    layout: KvLayout,
    num_heads: int,
    sliding_window: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> AttentionPlan:
    """``sliding_window``: a token sees itself and the ``sliding_window - 1`` tokens before it; None sees all."""
    decode = [row for row in rows if row.num_tokens == 1]
    whole_step = len(decode) == len(rows)
    groups = _group_by_pages(decode, layout.page_size, sliding_window)
    return AttentionPlan(
        num_heads=num_heads,
        scale=layout.head_dim**-0.5,
        decode=tuple(
            _decode_group(
                group, layout, sliding_window, dtype=dtype, device=device, in_order=whole_step and len(groups) == 1
            )
            for group in groups
        ),
        prefill=tuple(_prefill_chunk(row, layout, sliding_window, device) for row in rows if row.num_tokens > 1),
    )


def paged_attention(qkv_TC: torch.Tensor, kv: KvPages, layer: int, plan: AttentionPlan) -> torch.Tensor:
    """Attention of one layer; the step's own keys and values must be in the pages already.

    ``qkv_TC``: (T, (N + 2G) * H), rotated queries, rotated keys, values. Returns a new (T, N * H) tensor.
    """
    head_dim, num_kv_heads = kv.layout.head_dim, kv.layout.num_kv_heads
    q_size = plan.num_heads * head_dim
    if plan.decode and plan.decode[0].tokens is None:
        return _attend_decode(qkv_TC[:, :q_size], kv, layer, plan.decode[0], plan)
    out_TC = qkv_TC.new_empty((qkv_TC.shape[0], q_size))
    for group in plan.decode:
        assert group.tokens is not None
        q_BC = qkv_TC[:, :q_size].index_select(0, group.tokens)
        out_TC.index_copy_(0, group.tokens, _attend_decode(q_BC, kv, layer, group, plan))
    for chunk in plan.prefill:
        rows = slice(chunk.first_token, chunk.first_token + chunk.num_tokens)
        q_GQTH = qkv_TC[rows, :q_size].view(chunk.num_tokens, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        if chunk.tiles is None:
            own_TAGH = qkv_TC[rows, q_size:].view(chunk.num_tokens, 2, num_kv_heads, head_dim)
            k_GKH, v_GKH = own_TAGH.permute(1, 2, 0, 3).unbind(0)
        else:
            gathered = _gather(kv, layer, chunk.tiles).view(2, num_kv_heads, -1, head_dim)
            k_GKH, v_GKH = gathered[:, :, : chunk.num_keys].unbind(0)
        out_GQTH = functional.scaled_dot_product_attention(
            q_GQTH,
            k_GKH[:, None].expand(-1, q_GQTH.shape[1], -1, -1),
            v_GKH[:, None].expand(-1, q_GQTH.shape[1], -1, -1),
            attn_mask=chunk.mask,
            is_causal=chunk.mask is None,
            scale=plan.scale,
        )
        out_TC[rows].view(chunk.num_tokens, num_kv_heads, -1, head_dim).copy_(out_GQTH.permute(2, 0, 1, 3))
    return out_TC


def _attend_decode(
    q_BC: torch.Tensor, kv: KvPages, layer: int, group: DecodeGroup, plan: AttentionPlan
) -> torch.Tensor:
    """The Q query heads of a KV head are the rows of one small product, so that each key is read once."""
    head_dim, num_kv_heads = kv.layout.head_dim, kv.layout.num_kv_heads
    num_rows = q_BC.shape[0]
    k_XKH, v_XKH = _gather(kv, layer, group.tiles).view(2, num_rows * num_kv_heads, -1, head_dim).unbind(0)
    q_XQH = q_BC.reshape(num_rows * num_kv_heads, -1, head_dim)
    scores_XQK = torch.baddbmm(group.bias, q_XQH, k_XKH.transpose(1, 2), alpha=plan.scale)
    weights_XQK = scores_XQK.softmax(dim=-1, dtype=torch.float32).to(q_BC.dtype)
    return torch.bmm(weights_XQK, v_XKH).view(num_rows, -1)


def _gather(kv: KvPages, layer: int, tiles: torch.Tensor) -> torch.Tensor:
    return kv.tiles.index_select(0, tiles + layer * kv.layout.tiles_per_layer)


def _first_key(position: int, page_size: int, sliding_window: int | None) -> int:
    """The oldest position that a query at ``position`` sees, rounded down to a page."""
    if sliding_window is None:
        return 0
    return max(0, position - sliding_window + 1) // page_size * page_size


def _seen_pages(row: AttentionRow, page_size: int, sliding_window: int | None) -> Sequence[int]:
    first = _first_key(row.start, page_size, sliding_window) // page_size
    return row.pages[first : (row.end - 1) // page_size + 1]


def _group_by_pages(
    rows: Sequence[AttentionRow], page_size: int, sliding_window: int | None
) -> list[list[AttentionRow]]:
    """Cuts the rows, in order of length, wherever the pages that would only be padding are worth a launch."""
    counted = [(len(_seen_pages(row, page_size, sliding_window)), row) for row in rows]
    # A stable sort of rows that are alike keeps step order.
    counted.sort(key=lambda item: -item[0])
    groups: list[list[AttentionRow]] = []
    longest = 0
    for index, (num_pages, row) in enumerate(counted):
        saved_pages = (longest - num_pages) * (len(counted) - index)
        if not groups or (saved_pages >= _MIN_SAVED_PAGES and 4 * num_pages <= 3 * longest):
            groups.append([])
            longest = num_pages
        groups[-1].append(row)
    return [sorted(group, key=lambda row: row.first_token) for group in groups]


def _decode_group(
    rows: Sequence[AttentionRow],
    layout: KvLayout,
    sliding_window: int | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
    in_order: bool,
) -> DecodeGroup:
    page_size = layout.page_size
    tables = [_seen_pages(row, page_size, sliding_window) for row in rows]
    num_pages = max(len(table) for table in tables)
    # Padding repeats a page of the row itself: whatever it holds, it is the row's own.
    pages_BP = torch.tensor([[*table, *[table[0]] * (num_pages - len(table))] for table in tables], device=device)
    ends_B1 = torch.tensor([[row.end] for row in rows], device=device)
    firsts_B1 = torch.tensor([[_first_key(row.start, page_size, sliding_window)] for row in rows], device=device)
    positions_BK = firsts_B1 + torch.arange(num_pages * page_size, device=device)
    hidden_BK = positions_BK >= ends_B1
    if sliding_window is not None:
        hidden_BK |= positions_BK < ends_B1 - sliding_window
    bias_BK = torch.zeros(hidden_BK.shape, dtype=dtype, device=device).masked_fill_(hidden_BK, float("-inf"))
    tokens_B = None if in_order else torch.tensor([row.first_token for row in rows], device=device)
    return DecodeGroup(
        tokens=tokens_B,
        tiles=_tile_index(layout, pages_BP),
        bias=bias_BK.repeat_interleave(layout.num_kv_heads, dim=0)[:, None],
    )


def _prefill_chunk(
    row: AttentionRow, layout: KvLayout, sliding_window: int | None, device: torch.device
) -> PrefillChunk:
    first_key = _first_key(row.start, layout.page_size, sliding_window)
    tiles: torch.Tensor | None = None
    if row.start > 0:
        pages = torch.tensor([list(_seen_pages(row, layout.page_size, sliding_window))], device=device)
        tiles = _tile_index(layout, pages)
    mask_TK: torch.Tensor | None = None
    if row.start > 0 or (sliding_window is not None and row.end > sliding_window):
        queries_T1 = torch.arange(row.start, row.end, device=device)[:, None]
        keys_K = torch.arange(first_key, row.end, device=device)
        mask_TK = keys_K <= queries_T1
        if sliding_window is not None:
            mask_TK &= keys_K > queries_T1 - sliding_window
    return PrefillChunk(
        first_token=row.first_token,
        num_tokens=row.num_tokens,
        tiles=tiles,
        num_keys=row.end - first_key,
        mask=mask_TK,
    )


def _tile_index(layout: KvLayout, pages_BP: torch.Tensor) -> torch.Tensor:
    """Tiles of layer 0 by (key/value, row, head, page), flattened."""
    tiles_AG = torch.arange(layout.tiles_per_layer, device=pages_BP.device).view(2, layout.num_kv_heads)
    return (pages_BP[None, :, None, :] * layout.tiles_per_page + tiles_AG[:, None, :, None]).flatten()
