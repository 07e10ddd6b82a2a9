"""The decoder body that all families share: one forward pass of one rank over a step's tokens.

Owns the order of operations; weights, pages and routes are handed in. A LoRA's product is added to the projection's
output before anything else sees it: where the output is a partial sum, before the shards add theirs up, so that LoRA
asks for no collective of its own. Called by the executor under ``torch.inference_mode``.
Legend, sizes of the rank's part: T tokens, D hidden, B sampled rows, V vocabulary, N query heads, G KV heads, H head
dim, C = q + k + v columns.
"""

import torch
from loraplex_kernels import (
    KvPages,
    add_rms_norm_,
    apply_rotary_,
    linear,
    lora_add_,
    paged_attention,
    rms_norm,
    silu_mul,
    write_kv_,
)
from torch.nn import functional

from loraplex.core.model import ModelSpec
from loraplex.model_runner.adapter_layout import SITES
from loraplex.model_runner.batch import StepBatch
from loraplex.model_runner.families import Family
from loraplex.model_runner.peers import Peers
from loraplex.model_runner.weights import DecoderWeights


def forward(
    model: ModelSpec, family: Family, weights: DecoderWeights, kv: KvPages, batch: StepBatch, peers: Peers
) -> torch.Tensor | None:
    """Runs the step and stores its keys and values. ``model``: the rank's part. Returns (B, whole vocabulary) fp32
    logits; None when no row samples, and before the last stage."""
    num_tokens = batch.token_ids.shape[0]
    qk_size = model.q_size + model.kv_size
    eps = model.rms_norm_eps
    segments = batch.segments
    if weights.embedding is None:
        norm = weights.layers[0].input_norm
        residual_TD = norm.new_empty((num_tokens, model.hidden_size))
        peers.receive_hidden(residual_TD)
    else:
        residual_TD = functional.embedding(batch.token_ids, weights.embedding)
    normed_TD = rms_norm(residual_TD, weights.layers[0].input_norm, eps)
    next_norms = [layer.input_norm for layer in weights.layers[1:]] + [weights.final_norm]
    for index, (layer, next_norm) in enumerate(zip(weights.layers, next_norms, strict=True)):
        site = index * len(SITES)
        qkv_TC = linear(normed_TD, layer.qkv, layer.qkv_bias)
        lora_add_(qkv_TC, normed_TD, segments, site)
        if family.prepare_query_key is not None:
            family.prepare_query_key(qkv_TC, layer, model)
        apply_rotary_(qkv_TC[:, :qk_size].view(num_tokens, -1, model.head_dim), batch.angles)
        write_kv_(kv, index, batch.kv_rows, qkv_TC[:, model.q_size :].view(num_tokens, -1, model.head_dim))
        attended_TC = paged_attention(qkv_TC, kv, index, batch.attention)
        delta_TD = linear(attended_TC, layer.o)
        lora_add_(delta_TD, attended_TC, segments, site + 1)
        delta_TD = peers.all_reduce(delta_TD)
        normed_TD = add_rms_norm_(residual_TD, delta_TD, layer.post_norm, eps)
        gate_up_TJ = linear(normed_TD, layer.gate_up)
        lora_add_(gate_up_TJ, normed_TD, segments, site + 2)
        gated_TI = silu_mul(gate_up_TJ)
        delta_TD = linear(gated_TI, layer.down)
        lora_add_(delta_TD, gated_TI, segments, site + 3)
        delta_TD = peers.all_reduce(delta_TD)
        if next_norm is None:
            peers.send_hidden(residual_TD.add_(delta_TD))
        else:
            normed_TD = add_rms_norm_(residual_TD, delta_TD, next_norm, eps)
    if batch.num_sampled == 0 or weights.lm_head is None:
        return None
    rows_BD = normed_TD if batch.sampled is None else normed_TD.index_select(0, batch.sampled)
    return peers.gather_logits(linear(rows_BD, weights.lm_head)).float()
