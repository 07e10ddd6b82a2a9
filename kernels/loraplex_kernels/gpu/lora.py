"""LoRA of a step on the GPU: ``out += (x A^T) B`` with each token's own A and B, over tiles of tokens of one adapter.

Two kernels: the shrink writes ``x A^T`` as fp32 partial sums over splits of the input features; the expand adds the
partial sums in order and multiplies by B, alone (``lora_expand_``) or inside the operation that reads the projection's
output next (``rotary_write_kv``, ``silu_mul``, ``add_rms_norm``). No atomics: results are the same from run to run. The
grouping by adapter over one base follows Punica (Chen et al., 2023) and S-LoRA (Sheng et al., 2023).
Called by model_runner. Legend: T tokens, K input features, O output columns, M modules of a site, R rank_cap.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton

from loraplex_kernels.gpu import tuning
from loraplex_kernels.gpu._jit_lora import lora_expand_kernel, lora_shrink_kernel
from loraplex_kernels.gpu.lora_table import (
    ALL_SITES,
    ATTENTION_SITES,
    LoraTable,
    LoraTiles,
    PendingExpand,
    Site,
    partial_elements,
    view_partial,
)
from loraplex_kernels.gpu.lora_tiles import MAX_RANK, NUM_MODULES, TileArrays, build_tiles

__all__ = [
    "ALL_SITES",
    "ATTENTION_SITES",
    "MAX_RANK",
    "NUM_MODULES",
    "LoraTable",
    "LoraTiles",
    "PendingExpand",
    "Site",
    "TileArrays",
    "build_tiles",
    "lora_expand_",
    "lora_shrink",
    "partial_elements",
    "view_partial",
]


def lora_shrink(
    x_TK: torch.Tensor,
    table: LoraTable,
    layer: int,
    site: Site,
    tiles: LoraTiles,
    partial: torch.Tensor,
    *,
    plane: int = 0,
    overlap: bool = False,
    config: tuning.ShrinkConfig | None = None,
) -> None:
    """Writes ``x A^T`` of the tokens that have an adapter into ``partial``, whose rest is left as it is and never read.

    ``x_TK``: (T, K) dense. ``partial``: (splits, T, M * R), of ``view_partial``. ``plane``: of adapters with several.
    ``overlap``: starts before its predecessor on the stream ends, which must not write any argument.
    """
    num_tokens, in_features = x_TK.shape
    modules = site.num_modules
    config = config or tuning.shrink_config(in_features, modules, tiles.tile_rows, tiles.rank_cap)
    splits, part = partial.shape[0], tuning.split_features(in_features, modules)
    overlaps = tuning.overlaps(x_TK.device)
    assert x_TK.is_contiguous()
    assert partial.shape == (tuning.num_splits(in_features, modules), num_tokens, modules * tiles.rank_cap)
    assert tiles.tile_rows > 1 or config.block_k >= part
    whole_site = tiles.tile_rows > 16
    grid = (splits if whole_site else splits * modules, tiles.num_tiles)
    lora_shrink_kernel[grid](
        x_TK,
        partial,
        table.arena,
        table.entries,
        tiles.record,
        tiles.row,
        tiles.count,
        tiles.planes,
        2 * (layer * NUM_MODULES + site.first_module),
        plane,
        num_tokens,
        K=in_features,
        PART=part,
        SPLITS=splits,
        MODULES=modules,
        RECORD_ENTRIES=table.record_entries,
        RANK_CAP=tiles.rank_cap,
        RANK_BLOCK=tuning.rank_block(tiles.tile_rows, tiles.rank_cap),
        M=tiles.tile_rows,
        BLOCK_K=config.block_k,
        W=min(config.num_warps, max(1, config.block_k // 16)),
        STAGES=config.num_stages,
        EVICT=tuning.eviction(config.evict_first),
        EXACT=tuning.exact(x_TK.dtype),
        OVERLAP=overlaps,
        num_warps=config.num_warps,
        launch_pdl=overlap and overlaps,
    )


def lora_expand_(
    out_TO: torch.Tensor,
    partial: torch.Tensor,
    table: LoraTable,
    layer: int,
    site: Site,
    widths: Sequence[int],
    tiles: LoraTiles,
    *,
    plane: int = 0,
    add: bool = True,
    overlap: bool = False,
    config: tuning.ExpandConfig | None = None,
) -> None:
    """``out += partial B`` in place, each module into its own columns.

    ``out_TO``: (T, O) dense. ``widths``: columns of each of the site's modules, in order; together O. ``add`` false:
    ``out = partial B``, 0 for tokens without an adapter. ``overlap``: starts before its predecessor on the stream ends,
    which must not write adapters or tiles.
    """
    num_tokens = out_TO.shape[0]
    config = config or tuning.expand_config(tiles.num_tiles, tiles.tile_rows, tiles.rank_cap, max(widths))
    assert out_TO.is_contiguous()
    assert out_TO.shape[1] == sum(widths)
    assert len(widths) == site.num_modules
    grid = (sum(triton.cdiv(width, config.block_n * config.blocks) for width in widths), tiles.num_tiles)
    lora_expand_kernel[grid](
        out_TO,
        partial,
        table.arena,
        table.entries,
        tiles.record,
        tiles.row,
        tiles.count,
        tiles.planes,
        2 * (layer * NUM_MODULES + site.first_module) + 1,
        plane,
        num_tokens,
        WIDTH_0=widths[0],
        WIDTH_1=widths[1] if len(widths) > 1 else 0,
        WIDTH_2=widths[2] if len(widths) > 2 else 0,
        MODULES=site.num_modules,
        BLOCK_N=config.block_n,
        ADD=add,
        **expand_constants(table, partial, tiles, config, out_TO, overlap),
    )


def expand_constants(
    table: LoraTable,
    partial: torch.Tensor,
    tiles: LoraTiles,
    config: tuning.ExpandConfig,
    out: torch.Tensor,
    overlap: bool,
) -> dict[str, Any]:
    """Compile-time arguments that every kernel with an expand of tiles takes."""
    assert tiles.tile_rows > 1 or config.blocks == 1
    overlaps = tuning.overlaps(out.device)
    return {
        "RECORD_ENTRIES": table.record_entries,
        "SPLITS": partial.shape[0],
        "RANK_CAP": tiles.rank_cap,
        "RANK_BLOCK": tuning.rank_block(tiles.tile_rows, tiles.rank_cap),
        "M": tiles.tile_rows,
        "BLOCKS": config.blocks,
        "STAGES": config.num_stages,
        "EVICT": tuning.eviction(config.evict_first),
        "EXACT": tuning.exact(out.dtype),
        "OVERLAP": overlaps,
        "num_warps": config.num_warps,
        "maxnreg": config.max_registers,
        "launch_pdl": overlap and overlaps,
    }
