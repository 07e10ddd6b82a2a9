"""Sizes for which graphs exist: a step runs in the smallest that holds it. Pure; called by ``inputs``, ``host_step``.

A padded row or token takes part in the GEMMs and in nothing else; a dead tile is one program that returns at once.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

_MIXED_TOKENS = (*range(64, 513, 64), *range(640, 1025, 128), *range(1280, 2049, 256))

MAX_SEVERAL = 32
"""Rows of several tokens in a step that runs as a graph."""


@dataclass(frozen=True, slots=True)
class MixedBucket:
    """A step with prompts in it."""

    num_tokens: int
    num_singles: int
    """Rows of one token."""

    @property
    def num_sampled(self) -> int:
        return self.num_singles + MAX_SEVERAL


def mixed_token_buckets(max_step_tokens: int) -> tuple[int, ...]:
    """Of steps with prompts, ascending, none above ``max_step_tokens``. Steps above the last run eagerly: the device
    takes longer for them than the host for its launches."""
    last = min(max_step_tokens, _MIXED_TOKENS[-1])
    return (*(tokens for tokens in _MIXED_TOKENS if tokens < last), last)


def row_buckets(max_rows: int) -> tuple[int, ...]:
    """Of decode steps, ascending; the last is ``max_rows``. Fine where a padded row is a large share, coarse where a
    GEMM rounds up."""
    steps = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, *range(128, max_rows, 32))
    return (*(rows for rows in steps if rows < max_rows), max_rows)


def decode_tile_buckets(num_rows: int, tile_rows: int, most: int) -> tuple[int, ...]:
    """Of LoRA tiles of up to ``tile_rows`` rows in a decode step padded to ``num_rows`` that has at most ``most``,
    fewer than rows: ascending."""
    fewest = -(-num_rows // tile_rows)
    steps = {fewest, most, *(size for power in range(11) for size in (1 << power, 3 << power >> 1))}
    return tuple(tiles for tiles in sorted(steps) if fewest <= tiles <= min(most, num_rows - 1))


def single_buckets(max_rows: int) -> tuple[int, ...]:
    """Rows of one token in a step with prompts, ascending."""
    return (*(rows for rows in (0, 32, 128) if rows < max_rows), max_rows)


def mixed_tile_buckets(bucket: MixedBucket, max_rows: int, tile_rows: int) -> tuple[int, ...]:
    """LoRA tiles of a step with prompts, ascending: full ones, and some for runs that end early, at most each row's and
    the padding's; none is without a token."""
    full = -(-bucket.num_tokens // tile_rows)
    runs = min(bucket.num_sampled, max_rows) + 1
    extras = [*(extra for extra in (8, 64) if 2 * extra <= runs), runs]
    return tuple(sorted({min(full + extra, bucket.num_tokens) for extra in extras}))


def bucket_of(count: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds ``count``; it is at most the last."""
    return buckets[bisect_left(buckets, count)]
