"""The sum over the shards of a stage fused with what follows it: each GPU reads the others' parts of a row over peer
memory, adds them to the residual stream and takes the RMSNorm. The LoRA of o and down may come as shrunk activations,
which are summed in the same exchange and expanded there.

For steps of few tokens, where a collective and the launch of a norm take longer than the bytes. The parts lie in two
buffers that are used in turns: a rank writes a part of turn t again only after an exchange of the other turn, which its
peers take part in when they have read it. Called by model_runner. Legend: T tokens, D features, W ranks, R rank_cap.
"""

from dataclasses import dataclass

import torch

from loraplex_kernels.gpu import tuning
from loraplex_kernels.gpu._jit_peers import add_peers_rms_norm_kernel
from loraplex_kernels.gpu.lora import NUM_MODULES, PendingExpand


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRows:
    """What a rank has of the exchange. All ranks use the same turns for the same numbers of tokens."""

    rank: int
    own: torch.Tensor
    """(2, 2, rows, D): this rank's part goes to the first buffer of a turn, what LoRA adds may go to the second."""
    parts: torch.Tensor
    """(2, 2 * W) int64: of a turn, the addresses of all ranks' first buffers, then of the second; 16-byte aligned."""
    shrunk: torch.Tensor
    """(2, elements) fp32: of a turn, this rank's shrunk activations of o or down, in ``view_partial`` of its front."""
    shrunk_parts: torch.Tensor
    """(2, W) int64: of a turn, the addresses of all ranks' ``shrunk``."""
    flags: torch.Tensor
    """(W,) int64: addresses of each rank's (rows, W) int32 flags, 0 at the start."""
    counts: torch.Tensor
    """(rows,) int32: exchanges of each row so far, 0 at the start."""
    mapped: tuple[object, ...] = ()
    """What else must live as long as others may reach this rank's memory, its flags above all."""

    @property
    def num_rows(self) -> int:
        return self.own.shape[2]


def add_peers_rms_norm(
    residual_TD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    out_TD: torch.Tensor,
    rows: PeerRows,
    turn: int,
    *,
    added: bool = False,
    pending: PendingExpand | None = None,
    overlap: bool = False,
) -> None:
    """``residual += sum of all ranks' rows.own[turn, 0, :T]`` in place, then ``out = rms_norm(residual) * weight``; the
    same bits on all ranks. All (T, D) dense, T at most ``rows.num_rows``. ``turn``: 0 and 1 alternate. ``added``: the
    second buffers, ``rows.own[turn, 1, :T]``, belong to the sum as well, on all ranks or on none.
    ``pending``: at o or down, its partial sums in ``rows.shrunk[turn]`` of all ranks, or None on all. Each token reads
    its B by itself. ``overlap``: starts before its predecessor on the stream ends, which must be the only one, and
    write neither adapters nor tiles."""
    num_tokens, features = residual_TD.shape
    assert num_tokens <= rows.num_rows
    assert residual_TD.is_contiguous()
    assert out_TD.is_contiguous()
    overlaps = tuning.overlaps(out_TD.device)
    config = tuning.norm_config(features, lora=pending is not None)
    world = rows.parts.shape[1] // 2
    splits = 1 if pending is None else pending.partial.shape[0]
    add_peers_rms_norm_kernel[(num_tokens,)](
        residual_TD,
        weight_D,
        out_TD,
        rows.parts[turn],
        rows.flags,
        rows.counts,
        rows.shrunk_parts[turn],
        None if pending is None else pending.table.arena,
        None if pending is None else pending.table.entries,
        None if pending is None else pending.tiles.token_record,
        0 if pending is None else 2 * (pending.layer * NUM_MODULES + pending.site.first_module) + 1,
        num_tokens,
        eps,
        RANK=rows.rank,
        WORLD=world,
        BUFFERS=2 if added else 1,
        D=features,
        BLOCK_D=tuning.next_power_of_2(features),
        LORA=pending is not None,
        RECORD_ENTRIES=0 if pending is None else pending.table.record_entries,
        SPLITS=splits,
        PARTS=tuning.next_power_of_2(world * splits),
        RANK_CAP=16 if pending is None else pending.tiles.rank_cap,
        RANK_BLOCK=16 if pending is None else min(config.rank_block, pending.tiles.rank_cap),
        EVICT=tuning.eviction(config.evict_first),
        EXACT=tuning.exact(out_TD.dtype),
        OVERLAP=overlaps,
        EARLY=overlap and overlaps,
        num_warps=config.num_warps,
        launch_pdl=overlap and overlaps,
    )
