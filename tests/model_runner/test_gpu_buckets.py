"""Sizes of graphs: ascending, and large enough for every step."""

from itertools import pairwise

import pytest
from loraplex.model_runner.gpu.buckets import (
    decode_tile_buckets,
    mixed_tile_buckets,
    mixed_token_buckets,
    row_buckets,
    single_buckets,
)

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
        for num_tokens in tokens:
            tiles = mixed_tile_buckets(num_tokens, max_rows, 64)
            check_ascending(tiles)
            # Every row, and the padding, may end in a tile that is not full.
            assert tiles[-1] == -(-num_tokens // 64) + max_rows + 1


@pytest.mark.parametrize("num_rows", [2, 4, 8, 24, 96, 256])
def test_tiles_of_decode_steps_are_fewer_than_rows(num_rows: int) -> None:
    buckets = decode_tile_buckets(num_rows, 16, (num_rows - 1) // 2)
    assert list(buckets) == sorted(set(buckets))
    assert all(-(-num_rows // 16) <= tiles < num_rows for tiles in buckets)
