"""Block sizes and warps of the LoRA and per-layer kernels: by operation and size, no search at run time.

A config never changes what is computed beyond rounding; only ``num_splits`` is shared between a shrink and its expand.
The defaults suit an H100, run on any other GPU and in the interpreter. Called by the launchers; benchmarks pass others.
"""

from dataclasses import dataclass

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


def shrink_config(in_features: int, tile_rows: int) -> ShrinkConfig:
    part = next_power_of_2(split_features(in_features))
    if tile_rows > 16:
        return ShrinkConfig(
            block_k=min(1024, part), dot_block_k=min(64, part), num_warps=4, num_stages=4, evict_first=False
        )
    return ShrinkConfig(block_k=min(1024, part), dot_block_k=min(512, part), num_warps=4)


def expand_config(num_tiles: int, tile_rows: int, widest: int) -> ExpandConfig:
    """``widest``: columns of the site's widest module. Few tiles take narrow blocks, so that all SMs have work."""
    limit = next_power_of_2(widest)
    if tile_rows > 16:
        return ExpandConfig(block_n=min(64, limit), num_warps=4, evict_first=False)
    block_n = 256 if num_tiles < 16 else 512
    return ExpandConfig(block_n=min(block_n, limit), num_warps=2 if block_n == 256 else 4)
