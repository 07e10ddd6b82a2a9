"""Block sizes and warps of the LoRA and per-layer kernels: by operation and size, no search at run time.

A config never changes what is computed beyond rounding; only ``num_splits`` is shared between a shrink and its expand.
The defaults suit an H100, run on any other GPU and in the interpreter. Called by the launchers; benchmarks pass others.
"""

from dataclasses import dataclass

import torch
import triton

RANK_BLOCK = 16
"""Ranks that the kernels take at a time, the least that a dot accepts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShrinkConfig:
    block_k: int
    """Input features of one load in tiles of up to 16 rows."""
    dot_block_k: int
    """The same where the tile is a dot."""
    num_warps: int
    num_stages: int = 1
    evict_first: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpandConfig:
    """Of ``lora_expand_`` and of the operations that expand on their way."""

    block_n: int
    """Output columns of a program; of each half where the operation pairs two columns."""
    num_warps: int
    evict_first: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsConfig:
    """Operations without LoRA: rows of a program and its columns."""

    block_rows: int
    block_n: int
    num_warps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NormConfig:
    num_warps: int
    rank_block: int = 8
    """Ranks of B held at a time beside the row."""
    evict_first: bool = True


def next_power_of_2(value: int) -> int:
    """The smallest power of two that is at least ``value`` (>= 1)."""
    return 1 << (value - 1).bit_length()


def num_splits(in_features: int) -> int:
    """Parts into which a shrink cuts its input features, at most 8: about 1024 to 2048 features a part.

    A function of the features alone, so that a row's sum has one order in every step.
    """
    return min(8, -(-in_features // (1024 if in_features <= 8192 else 2048)))


def split_features(in_features: int) -> int:
    """Input features of each split but the last: a multiple of 64."""
    return -(-in_features // (num_splits(in_features) * 64)) * 64


def shrink_config(in_features: int, tile_rows: int, rank_cap: int) -> ShrinkConfig:
    part = next_power_of_2(split_features(in_features))
    if tile_rows > 16:
        # Stages hold x and up to three A in shared memory: at rank 64 two of them leave room for three programs.
        num_stages = 4 if rank_cap <= 16 else 2
        return ShrinkConfig(
            block_k=min(1024, part), dot_block_k=min(64, part), num_warps=4, num_stages=num_stages, evict_first=False
        )
    return ShrinkConfig(block_k=min(1024, part), dot_block_k=min(512, part), num_warps=4)


def expand_config(num_tiles: int, tile_rows: int, widest: int) -> ExpandConfig:
    """``widest``: columns of the site's widest module. Few tiles take narrow blocks, so that all SMs have work."""
    limit = next_power_of_2(widest)
    if tile_rows > 16:
        return ExpandConfig(block_n=min(64, limit), num_warps=4, evict_first=False)
    block_n = 256 if num_tiles < 16 else 512
    return ExpandConfig(block_n=min(block_n, limit), num_warps=2 if block_n == 256 else 4)


def rows_config(num_tokens: int, width: int) -> RowsConfig:
    """Of ``silu_mul`` without LoRA."""
    block_n = 1024 if num_tokens < 64 else 2048
    return RowsConfig(block_rows=1, block_n=min(block_n, next_power_of_2(width)), num_warps=4)


def heads_config(heads: int, head_dim: int, num_tiles: int | None, tile_rows: int) -> ExpandConfig:
    """Of ``rotary_write_kv``: ``block_n`` counts columns of half heads. ``num_tiles`` None: without LoRA."""
    half = head_dim // 2
    limit = half * next_power_of_2(heads)
    if num_tiles is None:
        return ExpandConfig(block_n=min(512, limit), num_warps=4)
    if tile_rows > 16:
        return ExpandConfig(block_n=half, num_warps=4, evict_first=False)
    block_n = 128 if num_tiles < 16 else 256
    return ExpandConfig(block_n=min(block_n, limit), num_warps=2 if block_n == 128 else 4)


def norm_config(features: int, *, lora: bool) -> NormConfig:
    wide = features > 2048
    return NormConfig(num_warps=(16 if wide else 8) if lora else (8 if wide else 4))


def eviction(first: bool) -> str:
    """Cache policy of loads of A and B: an adapter of one tile is read once."""
    return "evict_first" if first else ""


def exact(dtype: torch.dtype) -> bool:
    """Dots in fp32: for fp32 inputs, and in the interpreter, which has no bf16 arithmetic."""
    return dtype == torch.float32 or bool(triton.knobs.runtime.interpret)
