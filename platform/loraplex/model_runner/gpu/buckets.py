"""Sizes for which decode graphs exist: a step runs in the smallest that holds it. Pure; called by ``inputs``."""

from bisect import bisect_left
from collections.abc import Sequence


def row_buckets(max_rows: int) -> tuple[int, ...]:
    """Ascending; the last is ``max_rows``. Fine where a padded row is a large share, coarse where a GEMM rounds up."""
    steps = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, *range(128, max_rows, 32))
    return (*(rows for rows in steps if rows < max_rows), max_rows)


def tile_buckets(num_rows: int, tile_rows: int) -> tuple[int, ...]:
    """Ascending, for steps padded to ``num_rows``: from full tiles to one for each row. Dead tiles cost little, graphs
    cost memory and time to capture."""
    fewest = -(-num_rows // tile_rows)
    steps = {fewest, *(size for power in range(11) for size in (1 << power, 3 << power >> 1))}
    return (*(tiles for tiles in sorted(steps) if fewest <= tiles < num_rows), num_rows)


def bucket_of(count: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds ``count``; it is at most the last."""
    return buckets[bisect_left(buckets, count)]
