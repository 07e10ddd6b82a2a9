"""Between the fused q/k/v projection and attention: expand, norm of the heads, rotation, write of keys and values.

Half-split rotation as in ``loraplex_kernels.rotary``, pages as in ``loraplex_kernels.kv``. Called by model_runner.
Legend: T tokens, C = (N + 2G) * H columns, N query heads, G KV heads, H head dim, P positions, S slots.
"""

import torch
import triton

from loraplex_kernels.gpu import tuning
from loraplex_kernels.gpu._jit_rotary import rotary_write_kv_kernel, rotary_write_kv_lora_kernel
from loraplex_kernels.gpu.lora import NUM_MODULES, PendingExpand, Site, expand_constants
from loraplex_kernels.kv import KvLayout


def rotary_table(frequencies_F: torch.Tensor, max_positions: int, dtype: torch.dtype) -> torch.Tensor:
    """(P, H) in ``dtype``: of each position the cosines, then the sines, of its angles in fp32.

    ``frequencies_F``: (H / 2,) fp32 radians per token, from ``rotary_frequencies``. One table serves all layers.
    """
    positions = torch.arange(max_positions, device=frequencies_F.device)
    angles_PF = positions.float()[:, None] * frequencies_F
    return torch.cat((angles_PF.cos(), angles_PF.sin()), dim=1).to(dtype)


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
    config: tuning.ExpandConfig | None = None,
) -> None:
    """Rotates the queries in place and stores keys and values in the pages of their tokens.

    ``qkv_TC``: (T, C) dense, the projection's output, without its LoRA where one is pending; its key and value columns
    are left as they are. ``position_T``, ``token_slot_T``: (T,) int32; slot -1 is padding: nothing is stored for it.
    ``page_table_SP``: (S, max pages) int32 dense, page of each ``page_size`` positions of a slot. ``cos_sin_PH``: from
    ``rotary_table``. ``arena``: flat elements. ``q_norm_H``, ``k_norm_H``: weights of an RMS norm of each head before
    the rotation, both or none. ``lora``: a tensor like ``qkv_TC`` to add to it, or what is still to be expanded.
    ``config.block_n`` counts columns of half heads.
    """
    num_tokens, columns = qkv_TC.shape
    head_dim, kv_heads = layout.head_dim, layout.num_kv_heads
    heads = columns // head_dim - 2 * kv_heads
    pending = lora if isinstance(lora, PendingExpand) else None
    assert qkv_TC.is_contiguous()
    assert page_table_SP.is_contiguous()
    assert cos_sin_PH.is_contiguous()
    assert head_dim == tuning.next_power_of_2(head_dim)
    assert (q_norm_H is None) == (k_norm_H is None)
    config = config or tuning.heads_config(heads, head_dim, None if pending is None else pending.tiles.tile_rows)
    block_heads = max(1, config.block_n // (head_dim // 2))
    program_heads = block_heads * config.blocks
    programs = triton.cdiv(heads, program_heads) + 2 * triton.cdiv(kv_heads, program_heads)
    inputs = (qkv_TC, position_T, token_slot_T, page_table_SP, cos_sin_PH, q_norm_H, k_norm_H, arena)
    shapes = {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "PAGE_SIZE": layout.page_size,
        "LAYERS": layout.num_layers,
        "BLOCK_HEADS": block_heads,
        "HAS_NORM": q_norm_H is not None,
    }
    max_pages = page_table_SP.shape[1]
    if not isinstance(lora, PendingExpand):
        overlaps = tuning.overlaps(qkv_TC.device)
        rotary_write_kv_kernel[(programs, num_tokens)](
            *inputs,
            qkv_TC if lora is None else lora,
            layer,
            max_pages,
            eps,
            ADDED=lora is not None,
            OVERLAP=overlaps,
            num_warps=config.num_warps,
            launch_pdl=overlaps and lora is None,
            **shapes,
        )
        return
    tiles = lora.tiles
    assert lora.site is Site.QKV
    rotary_write_kv_lora_kernel[(programs, tiles.num_tiles)](
        *inputs,
        lora.partial,
        lora.table.arena,
        lora.table.entries,
        tiles.record,
        tiles.row,
        tiles.count,
        layer,
        2 * (lora.layer * NUM_MODULES + lora.site.first_module) + 1,
        num_tokens,
        max_pages,
        eps,
        **shapes,
        **expand_constants(lora.table, lora.partial, tiles, config, qkv_TC, lora.overlap),
    )
