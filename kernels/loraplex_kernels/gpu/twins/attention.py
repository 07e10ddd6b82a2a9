"""Twins of ``gpu.attention``: the pages of each row gathered, softmax over whole rows, all in fp64."""

import torch

from loraplex_kernels.gpu.attention import AttentionBlocks, DecodeScratch
from loraplex_kernels.kv import KvLayout


def decode_attention(
    q: torch.Tensor,
    row_token: torch.Tensor | None,
    row_slot: torch.Tensor,
    context_len: torch.Tensor,
    page_table: torch.Tensor,
    arena: torch.Tensor,
    layout: KvLayout,
    layer: int,
    out: torch.Tensor,
    scratch: DecodeScratch | None,
    *,
    num_splits: int,
    scale: float,
    sliding_window: int | None = None,
    blocks: AttentionBlocks | None = None,
) -> None:
    tokens = range(row_slot.shape[0]) if row_token is None else row_token.tolist()
    for token, slot, length in zip(tokens, row_slot.tolist(), context_len.tolist(), strict=True):
        if token < 0:
            continue
        if length == 0:
            out[token].zero_()
            continue
        k_GKH, v_GKH = _gather(page_table[slot], arena, layout, layer, length)
        span = slice(token, token + 1)
        out[span] = _attend(q[span, : out.shape[1]], k_GKH, v_GKH, length - 1, scale, sliding_window).to(out.dtype)


def prefill_attention(
    q: torch.Tensor,
    tiles: torch.Tensor,
    page_table: torch.Tensor,
    arena: torch.Tensor,
    layout: KvLayout,
    layer: int,
    out: torch.Tensor,
    *,
    block_tokens: int,
    scale: float,
    sliding_window: int | None = None,
    blocks: AttentionBlocks | None = None,
) -> None:
    for token, count, position, slot in tiles.tolist():
        if count == 0:
            continue
        k_GKH, v_GKH = _gather(page_table[slot], arena, layout, layer, position + count)
        span = slice(token, token + count)
        out[span] = _attend(q[span, : out.shape[1]], k_GKH, v_GKH, position, scale, sliding_window).to(out.dtype)


def _gather(
    pages_P: torch.Tensor, arena: torch.Tensor, layout: KvLayout, layer: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of positions [0, length), (G, K, H) fp64 each."""
    shape = (-1, layout.num_layers, 2, layout.num_kv_heads, layout.page_size, layout.head_dim)
    num_pages = -(-length // layout.page_size)
    kv_PAGSH = arena.view(shape)[pages_P[:num_pages].long(), layer]
    kv_AGKH = kv_PAGSH.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length].double()
    return kv_AGKH[0], kv_AGKH[1]


def _attend(
    q_TC: torch.Tensor,
    k_GKH: torch.Tensor,
    v_GKH: torch.Tensor,
    position: int,
    scale: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """(T, N * H) fp64 for queries at ``position`` and after."""
    num_tokens, (num_kv_heads, num_keys, head_dim) = q_TC.shape[0], k_GKH.shape
    q_GTQH = q_TC.double().view(num_tokens, num_kv_heads, -1, head_dim).transpose(0, 1)
    score_GTQK = torch.einsum("gtqh,gkh->gtqk", q_GTQH, k_GKH) * scale
    query_T1 = torch.arange(position, position + num_tokens, device=q_TC.device)[:, None]
    key_K = torch.arange(num_keys, device=q_TC.device)
    hidden_TK = key_K > query_T1
    if sliding_window is not None:
        hidden_TK |= key_K <= query_T1 - sliding_window
    score_GTQK.masked_fill_(hidden_TK[:, None], -torch.inf)
    return torch.einsum("gtqk,gkh->tgqh", score_GTQK.softmax(-1), v_GKH).reshape(num_tokens, -1)
