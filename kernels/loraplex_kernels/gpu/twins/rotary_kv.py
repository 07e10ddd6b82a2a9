"""Rotation of queries and keys and the write into the pages, in plain torch."""

import torch

from loraplex_kernels.gpu.lora_table import PendingExpand
from loraplex_kernels.gpu.twins.lora import expanded
from loraplex_kernels.gpu.twins.norm import rms_norm
from loraplex_kernels.kv import KvLayout


def rotary_write_kv(
    qkv_TC: torch.Tensor,
    position_T: torch.Tensor,
    token_slot_T: torch.Tensor,
    page_table_SP: torch.Tensor,
    cos_sin_PH: torch.Tensor,
    arena: torch.Tensor,
    layout: KvLayout,
    layer: int,
    *,
    q_norm_H: torch.Tensor | None = None,
    k_norm_H: torch.Tensor | None = None,
    eps: float = 0.0,
    lora: PendingExpand | torch.Tensor | None = None,
) -> None:
    num_tokens, head_dim, kv_heads = qkv_TC.shape[0], layout.head_dim, layout.num_kv_heads
    kv_size = kv_heads * head_dim
    q_size = qkv_TC.shape[1] - 2 * kv_size
    sums_TC = expanded(qkv_TC, lora, (q_size, kv_size, kv_size))
    q_TNH, k_TGH, v_TGH = (
        part.reshape(num_tokens, -1, head_dim) for part in torch.split(sums_TC, [q_size, kv_size, kv_size], dim=1)
    )
    for heads, weight_H in ((q_TNH, q_norm_H), (k_TGH, k_norm_H)):
        if weight_H is not None:
            rms_norm(heads.clone(), weight_H, eps, heads)
    cos_sin_TH = cos_sin_PH[position_T.long()].float()
    q_TNH, k_TGH = _rotate(q_TNH, cos_sin_TH), _rotate(k_TGH, cos_sin_TH)
    live_T = token_slot_T >= 0
    qkv_TC[live_T, :q_size] = q_TNH.reshape(num_tokens, -1)[live_T].to(qkv_TC.dtype)
    pages = arena.view(-1, layout.num_layers, 2, kv_heads, layout.page_size, head_dim)
    for token in torch.nonzero(live_T).flatten().tolist():
        position = int(position_T[token])
        page = int(page_table_SP[int(token_slot_T[token]), position // layout.page_size])
        pages[page, layer, 0, :, position % layout.page_size] = k_TGH[token].to(arena.dtype)
        pages[page, layer, 1, :, position % layout.page_size] = v_TGH[token].to(arena.dtype)


def _rotate(heads_TNH: torch.Tensor, cos_sin_TH: torch.Tensor) -> torch.Tensor:
    cos_T1F, sin_T1F = cos_sin_TH[:, None].chunk(2, dim=-1)
    low, high = heads_TNH.chunk(2, dim=-1)
    return torch.cat((low * cos_T1F - high * sin_T1F, high * cos_T1F + low * sin_T1F), dim=-1)
