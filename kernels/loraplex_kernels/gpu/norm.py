"""RMSNorm on the GPU: alone, after adding to the residual stream (with the expand of o or down), after the embedding.

Called by model_runner. Legend: T tokens, D features, V vocabulary, S slots.
"""

import torch
import triton

from loraplex_kernels.gpu import tuning
from loraplex_kernels.gpu._jit_rows import (
    add_rms_norm_kernel,
    add_rms_norm_tiles_kernel,
    embed_kernel,
    rms_norm_kernel,
)
from loraplex_kernels.gpu.lora import NUM_MODULES, PendingExpand


def rms_norm(
    x_TD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    out_TD: torch.Tensor,
    *,
    config: tuning.NormConfig | None = None,
) -> None:
    """``x / sqrt(mean(x^2) + eps) * weight`` in fp32. All (T, D) dense; ``out_TD`` may be ``x_TD``."""
    num_tokens, features = x_TD.shape
    config = config or tuning.norm_config(features, lora=False)
    assert x_TD.is_contiguous()
    assert out_TD.is_contiguous()
    rms_norm_kernel[(num_tokens,)](
        x_TD, weight_D, out_TD, eps, D=features, BLOCK_D=tuning.next_power_of_2(features), num_warps=config.num_warps
    )


def add_rms_norm(
    residual_TD: torch.Tensor,
    delta_TD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    out_TD: torch.Tensor,
    *,
    lora: PendingExpand | torch.Tensor | None = None,
    config: tuning.NormConfig | None = None,
    tile_config: tuning.RowsConfig | None = None,
) -> None:
    """``residual += delta`` in place, then ``out = rms_norm(residual) * weight``. All (T, D) dense.

    ``lora``: added to ``delta_TD``'s value (which is left as it is): a tensor like it, or what is pending at o or down.
    In tiles of up to 16 rows each token reads its B by itself, which suits adapters of few rows; otherwise call
    ``lora_expand_`` before. Larger tiles read it once for 16 tokens, and must cover all tokens.
    """
    num_tokens, features = residual_TD.shape
    pending = lora if isinstance(lora, PendingExpand) else None
    config = config or tuning.norm_config(features, lora=pending is not None)
    assert residual_TD.is_contiguous()
    assert delta_TD.is_contiguous()
    assert out_TD.is_contiguous()
    added = delta_TD if pending is not None or lora is None else lora
    overlaps = tuning.overlaps(out_TD.device)
    inputs = (residual_TD, delta_TD, added, weight_D, out_TD)
    shapes = {"D": features, "BLOCK_D": tuning.next_power_of_2(features), "ADDED": added is not delta_TD}
    if pending is None:
        add_rms_norm_kernel[(num_tokens,)](
            *inputs, None, None, None, None, 0, num_tokens, eps,
            LORA=False, RECORD_ENTRIES=0, SPLITS=1, RANK_CAP=16, RANK_BLOCK=16, EVICT="", EXACT=False,
            OVERLAP=overlaps, num_warps=config.num_warps, launch_pdl=overlaps and lora is None, **shapes,
        )  # fmt: skip
        return
    assert pending.site.num_modules == 1
    if pending.tiles.tile_rows > 16:
        tile_config = tile_config or tuning.norm_tile_config(features)
        _add_rms_norm_of_tiles(residual_TD, delta_TD, weight_D, eps, out_TD, pending, tile_config)
        return
    add_rms_norm_kernel[(num_tokens,)](
        *inputs,
        pending.partial,
        pending.table.arena,
        pending.table.entries,
        pending.tiles.token_record,
        2 * (pending.layer * NUM_MODULES + pending.site.first_module) + 1,
        num_tokens,
        eps,
        LORA=True,
        RECORD_ENTRIES=pending.table.record_entries,
        SPLITS=pending.partial.shape[0],
        RANK_CAP=pending.tiles.rank_cap,
        RANK_BLOCK=min(config.rank_block, pending.tiles.rank_cap),
        EVICT=tuning.eviction(config.evict_first),
        EXACT=tuning.exact(out_TD.dtype),
        OVERLAP=overlaps,
        num_warps=config.num_warps,
        launch_pdl=overlaps and pending.overlap,
        **shapes,
    )


def _add_rms_norm_of_tiles(
    residual_TD: torch.Tensor,
    delta_TD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    out_TD: torch.Tensor,
    pending: PendingExpand,
    config: tuning.RowsConfig,
) -> None:
    tiles = pending.tiles
    overlaps = tuning.overlaps(out_TD.device)
    grid = (triton.cdiv(tiles.tile_rows, config.block_rows), tiles.num_tiles)
    add_rms_norm_tiles_kernel[grid](
        residual_TD,
        delta_TD,
        weight_D,
        out_TD,
        pending.partial,
        pending.table.arena,
        pending.table.entries,
        tiles.record,
        tiles.row,
        tiles.count,
        2 * (pending.layer * NUM_MODULES + pending.site.first_module) + 1,
        residual_TD.shape[0],
        eps,
        D=residual_TD.shape[1],
        RECORD_ENTRIES=pending.table.record_entries,
        SPLITS=pending.partial.shape[0],
        RANK_CAP=tiles.rank_cap,
        M=config.block_rows,
        BLOCK_N=config.block_n,
        STAGES=config.num_stages,
        EVICT="",
        EXACT=tuning.exact(out_TD.dtype),
        OVERLAP=overlaps,
        num_warps=config.num_warps,
        launch_pdl=overlaps and pending.overlap,
    )


def embed(
    token_ids_T: torch.Tensor,
    token_slot_T: torch.Tensor,
    last_token_S: torch.Tensor,
    embedding_VD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    residual_TD: torch.Tensor,
    out_TD: torch.Tensor,
    *,
    config: tuning.NormConfig | None = None,
) -> None:
    """``residual = embedding[token]``, ``out = rms_norm(residual) * weight``, the start of a step.

    ``token_ids_T``: (T,) int32; -1 stands for ``last_token_S[token_slot_T]``, (S,) and (T,) int32: the token that the
    previous step sampled for the slot. A padding token (slot -1) with id -1 takes token 0.
    """
    num_tokens, features = residual_TD.shape
    config = config or tuning.norm_config(features, lora=False)
    assert embedding_VD.is_contiguous()
    assert residual_TD.is_contiguous()
    assert out_TD.is_contiguous()
    embed_kernel[(num_tokens,)](
        token_ids_T,
        token_slot_T,
        last_token_S,
        embedding_VD,
        weight_D,
        residual_TD,
        out_TD,
        eps,
        D=features,
        BLOCK_D=tuning.next_power_of_2(features),
        num_warps=config.num_warps,
    )
