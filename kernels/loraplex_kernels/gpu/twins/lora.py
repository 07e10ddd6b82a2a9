"""LoRA over tiles in plain torch: the meaning of ``gpu.lora``. Reads tiles and entries back to the host."""

from collections.abc import Sequence

import torch

from loraplex_kernels.gpu.lora_table import LoraTable, LoraTiles, PendingExpand, Site
from loraplex_kernels.gpu.lora_tiles import NUM_MODULES


def lora_shrink(
    x_TK: torch.Tensor,
    table: LoraTable,
    layer: int,
    site: Site,
    tiles: LoraTiles,
    partial: torch.Tensor,
    *,
    plane: int = 0,
) -> None:
    """The whole sum goes to the first split, 0 to the others."""
    for rows, record in _live_tiles(tiles, plane):
        for module in range(site.num_modules):
            a_RK = lora_block(table, record, layer, site.first_module + module, 0, x_TK.shape[1])
            first = module * tiles.rank_cap
            columns = slice(first, first + a_RK.shape[0])
            partial[:, rows, columns] = 0
            partial[0, rows, columns] = x_TK[rows].float() @ a_RK.float().t()


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
) -> None:
    if not add:
        out_TO.zero_()
    out_TO += _product(out_TO, partial, table, layer, site, widths, tiles, plane).to(out_TO.dtype)


def expanded(out_TO: torch.Tensor, lora: PendingExpand | torch.Tensor | None, widths: Sequence[int]) -> torch.Tensor:
    """``out_TO`` plus what is pending, a new (T, O) fp32 tensor; what the fused operations start from."""
    if lora is None:
        return out_TO.to(torch.float32, copy=True)
    if isinstance(lora, torch.Tensor):
        return out_TO.float() + lora.float()
    return out_TO.float() + _product(out_TO, lora.partial, lora.table, lora.layer, lora.site, widths, lora.tiles, 0)


def lora_block(table: LoraTable, record: int, layer: int, module: int, side: int, num_columns: int) -> torch.Tensor:
    """(rank, num_columns) view of A (side 0) or B (side 1); rank 0 where there is none."""
    entry = int(table.entries[record, layer * NUM_MODULES + module, side])
    start, rank = (entry >> 8) * 8, (entry & 255) * 8
    return table.arena[start : start + rank * num_columns].view(rank, num_columns)


def _product(
    out_TO: torch.Tensor,
    partial: torch.Tensor,
    table: LoraTable,
    layer: int,
    site: Site,
    widths: Sequence[int],
    tiles: LoraTiles,
    plane: int,
) -> torch.Tensor:
    delta_TO = torch.zeros_like(out_TO, dtype=torch.float32)
    for rows, record in _live_tiles(tiles, plane):
        column = 0
        for module, width in enumerate(widths):
            b_RO = lora_block(table, record, layer, site.first_module + module, 1, width)
            first = module * tiles.rank_cap
            shrunk_TR = partial[:, rows, first : first + b_RO.shape[0]].sum(0)
            delta_TO[rows, column : column + width] = shrunk_TR @ b_RO.float()
            column += width
    return delta_TO


def _live_tiles(tiles: LoraTiles, plane: int) -> list[tuple[slice, int]]:
    """(tokens, record of the plane) of the tiles that have one."""
    used = [getattr(tiles, name)[: tiles.num_tiles].tolist() for name in ("record", "row", "count", "planes")]
    return [
        (slice(row, row + count), record + plane)
        for record, row, count, planes in zip(*used, strict=True)
        if count and record >= 0 and plane < planes
    ]
