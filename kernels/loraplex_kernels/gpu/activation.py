"""SiLU-mul on the GPU, the gate of the feed-forward block, with the expand of gate and up on its way.

Called by model_runner. Legend: T tokens, I intermediate features, J = 2 * I.
"""

import torch
import triton

from loraplex_kernels.gpu import tuning
from loraplex_kernels.gpu._jit_rows import silu_mul_kernel
from loraplex_kernels.gpu.lora import NUM_MODULES, PendingExpand, Site, expand_constants


def silu_mul(
    gate_up_TJ: torch.Tensor,
    out_TI: torch.Tensor,
    *,
    lora: PendingExpand | None = None,
    config: tuning.ExpandConfig | tuning.RowsConfig | None = None,
) -> None:
    """``out = silu(gate) * up``, gate and up with their LoRA where one is pending.

    ``gate_up_TJ``: (T, 2I) dense, gate columns first, left as it is. ``out_TI``: (T, I) dense. With ``lora``, tokens
    that no tile covers are not written. ``config``: an ExpandConfig with ``lora``, a RowsConfig without.
    """
    num_tokens, width = out_TI.shape
    assert gate_up_TJ.shape == (num_tokens, 2 * width)
    assert gate_up_TJ.is_contiguous()
    assert out_TI.is_contiguous()
    if lora is None:
        rows = config if isinstance(config, tuning.RowsConfig) else tuning.rows_config(num_tokens, width)
        silu_mul_kernel[(triton.cdiv(width, rows.block_n), triton.cdiv(num_tokens, rows.block_rows))](
            gate_up_TJ, out_TI, None, None, None, None, None, None, 0, num_tokens,
            WIDTH=width, LORA=False, RECORD_ENTRIES=0, SPLITS=1, RANK_CAP=16, RANK_BLOCK=16, M=rows.block_rows,
            BLOCK_N=rows.block_n, INVARIANT=False, EVICT="", EXACT=False, num_warps=rows.num_warps,
        )  # fmt: skip
        return
    assert lora.site is Site.GATE_UP
    tiles = lora.tiles
    if not isinstance(config, tuning.ExpandConfig):
        config = tuning.expand_config(tiles.num_tiles, tiles.tile_rows, width)
    silu_mul_kernel[(triton.cdiv(width, config.block_n), tiles.num_tiles)](
        gate_up_TJ,
        out_TI,
        lora.partial,
        lora.table.arena,
        lora.table.entries,
        tiles.record,
        tiles.row,
        tiles.count,
        2 * (lora.layer * NUM_MODULES + lora.site.first_module) + 1,
        num_tokens,
        WIDTH=width,
        LORA=True,
        M=tiles.tile_rows,
        BLOCK_N=config.block_n,
        INVARIANT=tiles.batch_invariant,
        EXACT=tuning.exact(out_TI.dtype),
        num_warps=config.num_warps,
        **expand_constants(lora.table, lora.partial, tiles, tuning.RANK_BLOCK, config.evict_first),
    )
