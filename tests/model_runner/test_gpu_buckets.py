"""Sizes of graphs: ascending, and large enough for every step."""

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from loraplex.model_runner.gpu.buckets import (
    MAX_SEVERAL,
    MixedBucket,
    bucket_of,
    decode_tile_buckets,
    mixed_tile_buckets,
    mixed_token_buckets,
    row_buckets,
    single_buckets,
)
from loraplex_kernels.gpu.lora_tiles import build_tiles

MAX_ROWS = (1, 2, 4, 7, 31, 32, 63, 64, 128, 256, 512)


def check_ascending(buckets: tuple[int, ...]) -> None:
    assert buckets
    assert all(one < other for one, other in pairwise(buckets))


@pytest.mark.parametrize("max_rows", MAX_ROWS)
def test_buckets_ascend_to_what_may_come(max_rows: int) -> None:
    assert row_buckets(max_rows)[-1] == single_buckets(max_rows)[-1] == max_rows
    for buckets in (row_buckets(max_rows), single_buckets(max_rows)):
        check_ascending(buckets)
    for max_tokens in (max_rows, 100, 2048, 8192):
        tokens = mixed_token_buckets(max_tokens)
        check_ascending(tokens)
        assert tokens[-1] == min(max_tokens, 2048)
        for num_tokens, num_singles, tile_rows in product(tokens, single_buckets(max_rows), (16, 32, 64)):
            tiles = mixed_tile_buckets(MixedBucket(num_tokens, num_singles), max_rows, tile_rows)
            check_ascending(tiles)
            # Every row, and the padding, may end in a tile that is not full; every tile has a token.
            rows = min(num_singles + MAX_SEVERAL, max_rows)
            assert tiles[-1] == min(-(-num_tokens // tile_rows) + rows + 1, num_tokens)


@given(
    st.lists(st.integers(2, 700), max_size=MAX_SEVERAL),
    st.integers(0, 64),
    st.sampled_from([16, 32, 64]),
)
def test_the_last_bucket_holds_the_tiles_of_any_step(several: list[int], singles: int, tile_rows: int) -> None:
    """Each row has an adapter of its own, the padding none."""
    lengths = np.array([*several, *[1] * singles], dtype=np.int32)
    num_tokens = int(lengths.sum())
    assume(0 < num_tokens <= 2048)
    padded = bucket_of(num_tokens, mixed_token_buckets(2048))
    bucket = MixedBucket(padded, bucket_of(singles, single_buckets(96)))
    records = np.arange(len(lengths), dtype=np.int32)
    if padded > num_tokens:
        records, lengths = np.append(records, -1), np.append(lengths, padded - num_tokens)
    tiles = build_tiles(records, np.ones_like(records), lengths, tile_rows)
    assert tiles.num_live <= mixed_tile_buckets(bucket, 96, tile_rows)[-1]


@pytest.mark.parametrize("num_rows", [2, 4, 8, 24, 96, 256])
def test_tiles_of_decode_steps_are_fewer_than_rows(num_rows: int) -> None:
    buckets = decode_tile_buckets(num_rows, 16, (num_rows - 1) // 2)
    assert list(buckets) == sorted(set(buckets))
    assert all(-(-num_rows // 16) <= tiles < num_rows for tiles in buckets)
