"""One token per row from logits: temperature, top_k, top_p, min_p, then an exponential race (see ``noise``).

For one row, with weights w_v = exp((logit_v - largest logit) / temperature):
  1. temperature 0: the largest logit, the lowest id among equals; nothing else counts;
  2. top_k keeps the tokens as heavy as the k-th heaviest;
  3. top_p keeps, of what top_k left, the tokens as heavy as the last of the shortest run of heaviest ones whose share
     reaches top_p;
  4. min_p keeps weights of at least min_p.
  Each is a lower bound on the weight, so that equally likely tokens stay or go together.
  5. the token kept with the largest w_v / E_v.

This is the CPU path and the twin of ``gpu.sampling``, which computes the same without a sort.
Shape legend: B rows, R of them, V vocabulary, C window of heaviest tokens.
"""

from dataclasses import dataclass

import torch

from loraplex_kernels.noise import exponentials, row_keys

_WINDOW = 256
"""top_k and top_p look at this many heaviest tokens first, and at 16 times as many where that does not suffice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRows:
    """How each row of a batch is drawn: tensors on the device of the logits, and what the host knows of them.

    int64 and fp64 throughout, so that one copy to the device carries all of them.
    """

    slot: torch.Tensor
    """(B,) int64: where ``last_token`` takes the row's token."""
    seed: torch.Tensor
    """(B,) int64"""
    index: torch.Tensor
    """(B,) int64: which generated token of its request the row draws at step 0; it grows by one a step."""
    temperature: torch.Tensor
    """(B,) fp64; 0 is greedy."""
    top_k: torch.Tensor
    """(B,) int64; 0 means all."""
    top_p: torch.Tensor
    """(B,) fp64"""
    min_p: torch.Tensor
    """(B,) fp64"""
    cut_rows: torch.Tensor
    """(R,) int64: the drawing rows with top_k, top_p or min_p."""
    cut_place: torch.Tensor
    """(B,) int64: where a row stands in ``cut_rows``, or -1."""
    num_drawing: int
    """Rows that are not greedy."""


def draw_tokens(
    logits_BV: torch.Tensor, rows: SamplingRows, step: int, *, last_token: torch.Tensor | None = None
) -> torch.Tensor:
    """Token ids (B,) int64. ``logits_BV``: fp32 or bf16. ``step``: how often these rows were drawn before.
    ``last_token``: (num_slots,) int32, gets each row's token at its slot. A row of NaN yields some valid id."""
    tokens_B = logits_BV.argmax(dim=-1)
    if rows.num_drawing:
        drawing_R = rows.temperature.nonzero().squeeze(1)
        tokens_B[drawing_R] = _race(logits_BV[drawing_R].float(), rows, drawing_R, step)
    if last_token is not None:
        last_token[rows.slot] = tokens_B.to(torch.int32)
    return tokens_B


def _race(logits_RV: torch.Tensor, rows: SamplingRows, drawing_R: torch.Tensor, step: int) -> torch.Tensor:
    """Weights are relative to the likeliest token's, which is 1."""
    largest_R1 = logits_RV.amax(dim=-1, keepdim=True)
    weights_RV = ((logits_RV - largest_R1) / rows.temperature[drawing_R].float().unsqueeze(1)).exp_()
    cut = (rows.cut_place[drawing_R] >= 0).nonzero().squeeze(1)
    if cut.numel():
        of = drawing_R[cut]
        cut_CV = weights_RV[cut]
        bound_C1 = _lower_bound(cut_CV, rows.top_k[of].unsqueeze(1), rows.top_p[of].unsqueeze(1), _WINDOW)
        bound_C1 = torch.maximum(bound_C1, rows.min_p[of].float().unsqueeze(1))
        weights_RV[cut] = cut_CV.masked_fill(cut_CV < bound_C1, 0.0)
    noise_RV = exponentials(row_keys(rows.seed[drawing_R], rows.index[drawing_R] + step), logits_RV.shape[1])
    return weights_RV.div_(noise_RV).argmax(dim=-1)


def _lower_bound(weights_RV: torch.Tensor, top_k_R1: torch.Tensor, top_p_R1: torch.Tensor, window: int) -> torch.Tensor:
    """The smallest weight (R, 1) that top_k and then top_p keep, found among the ``window`` largest weights; rows
    where that does not suffice are done again with a larger window."""
    vocab_size = weights_RV.shape[1]
    window = min(window, vocab_size)
    top_k_R1 = top_k_R1.clamp(max=vocab_size)
    top_RC = weights_RV.topk(window, dim=-1).values
    kth_R1 = top_RC.gather(1, (top_k_R1 - 1).clamp(0, window - 1))
    kth_R1 = torch.where(top_k_R1 > 0, kth_R1, torch.zeros_like(kth_R1))
    goal_R1 = top_p_R1 * weights_RV.masked_fill(weights_RV < kth_R1, 0.0).cumsum(-1, dtype=torch.float64)[:, -1:]
    top_RC = top_RC.masked_fill(top_RC < kth_R1, 0.0)
    cdf_RC = top_RC.cumsum(dim=-1, dtype=torch.float64)
    num_kept_R1 = ((cdf_RC < goal_R1).sum(dim=-1, keepdim=True) + 1).clamp_(max=window)
    nucleus_R1 = top_RC.gather(1, num_kept_R1 - 1)
    bound_R1 = torch.where(top_p_R1 < 1.0, torch.maximum(kth_R1, nucleus_R1), kth_R1)
    if window == vocab_size:
        return bound_R1
    # A zero at the end of the window: everything that top_k leaves lies inside it.
    enough_R1 = (cdf_RC[:, -1:] >= goal_R1) | (top_RC[:, -1:] == 0.0) | (top_p_R1 >= 1.0)
    rest_R = (~enough_R1 | (top_k_R1 > window)).squeeze(1)
    if bool(rest_R.any()):
        bound_R1[rest_R] = _lower_bound(weights_RV[rest_R], top_k_R1[rest_R], top_p_R1[rest_R], window * 16)
    return bound_R1
