"""Twins of ``gpu.attention``: the pages of each row gathered, softmax over whole rows, all in fp64."""

import torch

from loraplex_kernels.gpu.attention import AttentionBlocks, DecodeScratch
from loraplex_kernels.kv import KvLayout


def decode_attention(
    q: torch.Tensor,
    parts: torch.Tensor,
    page_table: torch.Tensor,
    arena: torch.Tensor,
    layout: KvLayout,
    layer: int,
    out: torch.Tensor,
    scratch: DecodeScratch | None,
    *,
    scale: float,
    blocks: AttentionBlocks | None = None,
) -> None:
    listed = parts.tolist()
    for index, (token, slot, begin, _, first_part, num_parts, *_) in enumerate(listed):
        if num_parts == 0 or index > first_part:
            continue
        end = listed[first_part + num_parts - 1][3]
        if end == 0:
            out[token].zero_()
            continue
        rows = slice(token, token + 1)
        kv = _gather(page_table[slot], arena, layout, layer, begin, end)
        out[rows] = _attend(q[rows, : out.shape[1]], *kv, scale, None).to(out.dtype)


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
        rows = slice(token, token + count)
        first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
        kv = _gather(page_table[slot], arena, layout, layer, first, position + count)
        out[rows] = _attend(q[rows, : out.shape[1]], *kv, scale, sliding_window).to(out.dtype)


def _gather(
    pages_P: torch.Tensor,
    arena: torch.Tensor,
    layout: KvLayout,
    layer: int,
    first: int,
    end: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, (G, K, H) fp64 each, from ``first`` up to ``end``."""
    key_K = torch.arange(first, end, device=arena.device)
    shape = (-1, layout.num_layers, 2, layout.num_kv_heads, layout.page_size, layout.head_dim)
    page_K = pages_P[key_K // layout.page_size].long()
    kv_KAGH = arena.view(shape)[page_K, layer, :, :, key_K % layout.page_size].double()
    k_GKH, v_GKH = kv_KAGH.permute(1, 2, 0, 3)
    return k_GKH, v_GKH


def _attend(
    q_TC: torch.Tensor, k_GKH: torch.Tensor, v_GKH: torch.Tensor, scale: float, sliding_window: int | None
) -> torch.Tensor:
    """(T, N * H) fp64: the queries of the last T of the K positions."""
    num_tokens, (num_kv_heads, num_keys, head_dim) = q_TC.shape[0], k_GKH.shape
    q_GTQH = q_TC.double().view(num_tokens, num_kv_heads, -1, head_dim).transpose(0, 1)
    score_GTQK = torch.einsum("gtqh,gkh->gtqk", q_GTQH, k_GKH) * scale
    key_K = torch.arange(num_keys, device=q_TC.device)
    query_T1 = key_K[-num_tokens:, None]
    hidden_TK = key_K > query_T1
    if sliding_window is not None:
        hidden_TK |= key_K <= query_T1 - sliding_window
    score_GTQK.masked_fill_(hidden_TK[:, None], -torch.inf)
    return torch.einsum("gtqk,gkh->tgqh", score_GTQK.softmax(-1), v_GKH).reshape(num_tokens, -1)
