"""Sizes for which decode graphs exist: a step runs in the smallest that holds it. Pure; called by ``inputs``."""

from bisect import bisect_left
from collections.abc import Sequence


def row_buckets(max_rows: int) -> tuple[int, ...]:
    """Ascending; the last is ``max_rows``. Fine where a row costs most: up to 8 one row of 8 is an eighth."""
    steps = (1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(320, max_rows + 64, 64))
    return (*(rows for rows in steps if rows < max_rows), max_rows)


def tile_buckets(max_tiles: int) -> tuple[int, ...]:
    """Ascending; the last is ``max_tiles``. Dead tiles cost little, graphs cost memory and time to capture."""
    steps = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
    return (*(tiles for tiles in steps if tiles < max_tiles), max_tiles)


def bucket_of(count: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds ``count``; it is at most the last."""
    return buckets[bisect_left(buckets, count)]
