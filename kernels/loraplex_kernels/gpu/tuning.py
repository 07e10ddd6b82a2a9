"""Block sizes, warps and schedules of the LoRA and per-layer kernels: by operation and size, no search at run time.

A config never changes what is computed beyond rounding; only ``num_splits`` is shared between a shrink and its expand.
The defaults suit an H100, run on any other GPU and in the interpreter. Called by the launchers; benchmarks pass others.
"""

from dataclasses import dataclass
from enum import Enum
from functools import cache

import torch
import triton


@dataclass(frozen=True, slots=True, kw_only=True)
class ShrinkConfig:
    block_k: int
    """Input features of one load; in tiles of one row all of a split."""
    num_warps: int
    num_stages: int = 1
    evict_first: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpandConfig:
    """Of ``lora_expand_`` and of the operations that expand on their way."""

    block_n: int
    """Output columns of a block; of each half where the operation pairs two columns."""
    num_warps: int
    blocks: int = 1
    """Blocks of a program one after another, which read the shrunk activations once. 1 in tiles of one row."""
    num_stages: int = 1
    """Of the loop over them: blocks that are on their way at a time."""
    max_registers: int | None = None
    """Of a thread; None: what the compiler takes."""
    evict_first: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsConfig:
    """Rows of a program, and its columns or those of its blocks."""

    block_rows: int
    block_n: int
    num_warps: int
    num_stages: int = 3
    """Of loops over the blocks of a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NormConfig:
    num_warps: int
    rank_block: int = 16
    """Ranks of B held at a time beside the row."""
    evict_first: bool = True


class Schedule(Enum):
    """Where a step's shrinks and expands run."""

    BESIDE = "beside"
    """Both on a second stream while the GEMM runs; the operation that follows adds their result."""
    SERIAL = "serial"
    """The shrink after the GEMM, whose last programs it overlaps; the expand in the operation that follows."""


def schedule(num_tokens: int, tile_rows: int, num_tiles: int) -> Schedule:
    """A GEMM of few rows waits for its weights and leaves room for other work; one of many does so where there is much
    to read for the adapters."""
    if tile_rows == 16:
        beside = num_tokens <= 128 or 6 * num_tiles > num_tokens
    else:
        beside = tile_rows == 1 and num_tokens <= 32
    return Schedule.BESIDE if beside else Schedule.SERIAL


def fuses_norm(num_tokens: int, tile_rows: int) -> bool:
    """Whether ``add_rms_norm`` expands. It reads B once a row, right where rows have adapters of their own and are as
    many as SMs, or once for 16 rows of a large tile, which are then the work of one program: right where there are
    many."""
    return (tile_rows == 1 and num_tokens > 96) or (tile_rows > 16 and num_tokens >= 2048)


def fuses_peers_norm(num_tokens: int, tile_rows: int) -> bool:
    """Whether ``add_peers_rms_norm`` expands, B a row at a time while it waits for the other ranks: not where many rows
    share what a tile reads once."""
    return tile_rows == 1 or (tile_rows == 16 and num_tokens <= 128)


def next_power_of_2(value: int) -> int:
    """The smallest power of two that is at least ``value`` (>= 1)."""
    return 1 << (value - 1).bit_length()


def num_splits(in_features: int, num_modules: int) -> int:
    """Parts into which a shrink of ``num_modules`` modules cuts its input features: about 1024 features a part, 512
    where there is one module and few features, 2048 where there are many.

    A function of the shape alone, so that a row's sum has one order in every step.
    """
    part = 512 if num_modules == 1 and in_features <= 8192 else 1024
    return -(-in_features // (part if in_features <= 16 * part else 2 * part))


def split_features(in_features: int, num_modules: int) -> int:
    """Input features of each split but the last: a multiple of 64."""
    return -(-in_features // (num_splits(in_features, num_modules) * 64)) * 64


def shrink_config(in_features: int, num_modules: int, tile_rows: int, rank_cap: int) -> ShrinkConfig:
    part = next_power_of_2(split_features(in_features, num_modules))
    if tile_rows == 1:
        # 16 rows of 256 features a warp, or 8 of 512: what a thread loads of them takes half of its registers.
        features = 256 * 16 // rank_block(tile_rows, rank_cap)
        return ShrinkConfig(block_k=part, num_warps=min(8, max(1, part // features)))
    if tile_rows == 16:
        # Two blocks on their way: all of a split, or half of it.
        return ShrinkConfig(block_k=min(512 if rank_cap <= 16 else 256, part), num_warps=4, num_stages=3)
    if rank_cap <= 16:
        return ShrinkConfig(block_k=min(128, part), num_warps=4, num_stages=2, evict_first=False)
    return ShrinkConfig(block_k=min(64, part), num_warps=4, num_stages=3, evict_first=False)


def rank_block(tile_rows: int, rank_cap: int) -> int:
    """Ranks that an expand takes at a time: in a dot all, in a matrix-vector product what fits into registers."""
    return min(16, rank_cap) if tile_rows == 1 else rank_cap


def expand_config(num_tiles: int, tile_rows: int, rank_cap: int, widest: int, *, pairs: bool = False) -> ExpandConfig:
    """``widest``: columns of the site's widest module. ``pairs``: two columns at a time (gate and up)."""
    limit = next_power_of_2(widest)
    if tile_rows == 1:
        # 256 columns of 16 ranks a warp, or 512 of 8: a thread adds its columns over the ranks without the others.
        return ExpandConfig(block_n=min(512, limit), num_warps=2 if rank_cap > 8 else 1)
    if tile_rows == 16:
        if num_tiles < 16:
            return ExpandConfig(block_n=min(256 if rank_cap <= 16 else 128, limit), num_warps=4)
        return ExpandConfig(block_n=min(128, limit), num_warps=4, blocks=2)
    if pairs and rank_cap <= 16:
        # Four programs share an SM, which a few registers more would make three.
        return ExpandConfig(
            block_n=min(64, limit), num_warps=4, blocks=8, num_stages=2, max_registers=128, evict_first=False
        )
    if pairs:
        return ExpandConfig(block_n=min(64, limit), num_warps=4, blocks=8, evict_first=False)
    return ExpandConfig(block_n=min(128, limit), num_warps=8, blocks=4, evict_first=False)


def rows_config(num_tokens: int, width: int) -> RowsConfig:
    """Of ``silu_mul`` without LoRA."""
    block_n = 1024 if num_tokens < 64 else 2048
    return RowsConfig(block_rows=1, block_n=min(block_n, next_power_of_2(width)), num_warps=4)


def heads_config(heads: int, head_dim: int, tile_rows: int | None) -> ExpandConfig:
    """Of ``rotary_write_kv``: ``block_n`` counts columns of half heads. ``tile_rows`` None: no pending expand."""
    half = head_dim // 2
    limit = half * next_power_of_2(heads)
    if tile_rows is None:
        return ExpandConfig(block_n=min(512, limit), num_warps=4)
    if tile_rows == 1:
        return ExpandConfig(block_n=min(128, limit), num_warps=1)
    if tile_rows == 16:
        return ExpandConfig(block_n=min(128, limit), num_warps=4)
    return ExpandConfig(block_n=half, num_warps=8, blocks=8, num_stages=3, evict_first=False)


def shrinks_ahead(num_tokens: int, tile_rows: int) -> bool:
    """Whether ``silu_mul`` shrinks for down: its programs are large then, right where there are many tiles."""
    return tile_rows > 16 and num_tokens >= 2048


def norm_tile_config(features: int) -> RowsConfig:
    """Of ``add_rms_norm`` over tiles of more than 16 rows."""
    return RowsConfig(block_rows=16, block_n=min(256, next_power_of_2(features)), num_warps=4)


def norm_config(features: int, *, lora: bool) -> NormConfig:
    wide = features > 2048
    return NormConfig(num_warps=(16 if wide else 8) if lora else (8 if wide else 4))


@cache
def overlaps(device: torch.device) -> bool:
    """Whether a kernel can start before its predecessor ends (programmatic dependent launch)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def eviction(first: bool) -> str:
    """Cache policy of loads of A and B: an adapter of one tile is read once."""
    return "evict_first" if first else ""


def exact(dtype: torch.dtype) -> bool:
    """Dots in fp32: for fp32 inputs, and in the interpreter, which has no bf16 arithmetic."""
    return dtype == torch.float32 or bool(triton.knobs.runtime.interpret)
