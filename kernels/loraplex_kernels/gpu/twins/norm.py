"""RMSNorm, the residual stream and the embedding in plain torch."""

import torch

from loraplex_kernels.gpu.lora_table import PendingExpand
from loraplex_kernels.gpu.twins.lora import expanded


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, out_TD: torch.Tensor) -> None:
    x = x_TD.float()
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    out_TD.copy_(normed * weight_D.float())


def add_rms_norm(
    residual_TD: torch.Tensor,
    delta_TD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    out_TD: torch.Tensor,
    *,
    lora: PendingExpand | torch.Tensor | None = None,
) -> None:
    if lora is not None:
        delta_TD = expanded(delta_TD, lora, (delta_TD.shape[1],))
    residual_TD.copy_(residual_TD.float() + delta_TD.float())
    rms_norm(residual_TD, weight_D, eps, out_TD)


def embed(
    token_ids_T: torch.Tensor,
    token_slot_T: torch.Tensor,
    last_token_S: torch.Tensor,
    embedding_VD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    residual_TD: torch.Tensor,
    out_TD: torch.Tensor,
) -> None:
    sampled_T = last_token_S[token_slot_T.clamp_min(0).long()]
    ids_T = torch.where(token_ids_T >= 0, token_ids_T, torch.where(token_slot_T >= 0, sampled_T, 0))
    residual_TD.copy_(embedding_VD[ids_T.long()])
    rms_norm(residual_TD, weight_D, eps, out_TD)
