"""SiLU-mul on the GPU, the gate of the feed-forward block, with the expand of gate and up and the shrink of down on its
way.

Called by model_runner. Legend: T tokens, I intermediate features, J = 2 * I.
"""

from dataclasses import replace

import torch
import triton

from loraplex_kernels.gpu import tuning
from loraplex_kernels.gpu._jit_rows import silu_mul_kernel, silu_mul_lora_kernel
from loraplex_kernels.gpu.lora import NUM_MODULES, PendingExpand, Site, expand_constants


def silu_mul(
    gate_up_TJ: torch.Tensor,
    out_TI: torch.Tensor,
    *,
    lora: PendingExpand | torch.Tensor | None = None,
    shrink: PendingExpand | None = None,
    config: tuning.ExpandConfig | tuning.RowsConfig | None = None,
) -> None:
    """``out = silu(gate) * up``, gate and up with their LoRA where one is pending.

    ``gate_up_TJ``: (T, 2I) dense, gate columns first, left as it is. ``out_TI``: (T, I) dense. ``lora``: a tensor like
    ``gate_up_TJ`` to add to it, or what is still to be expanded; then tokens that no tile covers are not written.
    ``shrink``: of down, where ``lora`` is pending in tiles of more than 16 rows: its ``partial`` is filled with what
    ``lora_shrink`` would make of ``out_TI``. ``config``: an ExpandConfig with a pending expand, a RowsConfig without.
    """
    num_tokens, width = out_TI.shape
    assert gate_up_TJ.shape == (num_tokens, 2 * width)
    assert gate_up_TJ.is_contiguous()
    assert out_TI.is_contiguous()
    if not isinstance(lora, PendingExpand):
        assert shrink is None
        rows = config if isinstance(config, tuning.RowsConfig) else tuning.rows_config(num_tokens, width)
        overlaps = tuning.overlaps(out_TI.device)
        silu_mul_kernel[(triton.cdiv(width, rows.block_n), triton.cdiv(num_tokens, rows.block_rows))](
            gate_up_TJ,
            gate_up_TJ if lora is None else lora,
            out_TI,
            num_tokens,
            WIDTH=width,
            ADDED=lora is not None,
            M=rows.block_rows,
            BLOCK_N=rows.block_n,
            OVERLAP=overlaps,
            num_warps=rows.num_warps,
            launch_pdl=overlaps and lora is None,
        )
        return
    assert lora.site is Site.GATE_UP
    tiles = lora.tiles
    if not isinstance(config, tuning.ExpandConfig):
        config = tuning.expand_config(tiles.num_tiles, tiles.tile_rows, tiles.rank_cap, width, pairs=True)
    if shrink is not None:
        assert shrink.site is Site.DOWN
        assert tiles.tile_rows > 16
        config = replace(config, blocks=tuning.split_features(width, 1) // config.block_n)
    silu_mul_lora_kernel[(triton.cdiv(width, config.block_n * config.blocks), tiles.num_tiles)](
        gate_up_TJ,
        out_TI,
        lora.partial,
        None if shrink is None else shrink.partial,
        lora.table.arena,
        lora.table.entries,
        tiles.record,
        tiles.row,
        tiles.count,
        2 * (lora.layer * NUM_MODULES + lora.site.first_module) + 1,
        num_tokens,
        WIDTH=width,
        BLOCK_N=config.block_n,
        SHRINK=shrink is not None,
        **expand_constants(lora.table, lora.partial, tiles, config, out_TI, lora.overlap),
    )
