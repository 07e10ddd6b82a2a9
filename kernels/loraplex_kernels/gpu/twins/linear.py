"""Dense projections in plain torch."""

import torch


def linear(
    x_TK: torch.Tensor, weight_NK: torch.Tensor, out_TN: torch.Tensor, *, bias_N: torch.Tensor | None = None
) -> None:
    sum_TN = x_TK.float() @ weight_NK.float().T
    out_TN.copy_(sum_TN if bias_N is None else sum_TN + bias_N.float())
