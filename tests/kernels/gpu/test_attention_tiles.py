"""What the programs of the attention kernels are given: tiles of prompts, parts of the contexts of decode rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_kernels.gpu.attention_tiles import (
    PART_FIELDS,
    DecodeCut,
    build_decode_parts,
    build_prefill_tiles,
    decode_concurrency,
)


def test_tiles_of_two_rows() -> None:
    assert build_prefill_tiles((0,), (40,), (8,), (3,), 32).tolist() == [[40, 8, 32, 3], [8, 32, 0, 3]]
    assert build_prefill_tiles([], [], [], [], 32).shape == (0, 4)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 70), st.integers(1, 90)), min_size=1, max_size=6),
    block_tokens=st.integers(1, 42),
)
def test_tiles_cover_each_token_once_longest_first(rows: list[tuple[int, int]], block_tokens: int) -> None:
    starts, counts = zip(*rows, strict=True)
    firsts = np.cumsum([0, *counts])[:-1]
    tiles = build_prefill_tiles(starts, counts, firsts, [10 + row for row in range(len(rows))], block_tokens)
    covered = []
    for first, count, position, slot in tiles.tolist():
        assert 1 <= count <= block_tokens
        row = slot - 10
        assert position - starts[row] == first - firsts[row]
        assert position + count <= starts[row] + counts[row]
        covered += range(first, first + count)
    assert sorted(covered) == [*range(sum(counts))]
    ends = tiles[:, 1] + tiles[:, 2]
    assert (np.diff(ends) <= 0).all()


def test_as_many_parts_at_a_time_as_the_gpu_has_room_for() -> None:
    assert [decode_concurrency(kv_heads, 132) for kv_heads in (8, 4, 2, 1)] == [33, 66, 128, 128]
    assert decode_concurrency(64, 8) == 1


@pytest.mark.parametrize(
    ("lengths", "num_parts", "longest"),
    [
        # Padding.
        ([0, 0], 2, 0),
        # So many of like length that the memory is busy.
        ([320] * 32, 32, 320),
        ([1000, 980, 901] * 6, 18, 1000),
        # Too few: all their parts at a time.
        ([8192] * 16, 32, 4096),
        ([1024] * 8, 32, 256),
        ([8192], 16, 512),
        ([32768], 32, 1024),
        # One that many others are not long enough to run beside.
        ([320] * 31 + [8192], 47, 512),
        ([320] * 255 + [8192], 260, 1664),
        # One that is no longer than its fair share.
        ([320] * 127 + [1200], 128, 1200),
    ],
)
def test_long_contexts_are_cut_where_they_would_keep_the_step_waiting(
    lengths: list[int], num_parts: int, longest: int
) -> None:
    rows = range(len(lengths))
    parts = build_decode_parts(lengths, rows, rows, DecodeCut(block_keys=32, concurrency=33))
    assert len(parts) == num_parts
    assert (parts[:, 3] - parts[:, 2]).max() == longest


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9000) | st.integers(0, 40), max_size=40),
    block_keys=st.sampled_from([16, 64]),
    concurrency=st.integers(1, 50),
    window=st.none() | st.integers(1, 300),
    per_row=st.none() | st.integers(1, 5),
)
def test_parts_cover_each_key_once_longest_rows_first(
    lengths: list[int], block_keys: int, concurrency: int, window: int | None, per_row: int | None
) -> None:
    cut = DecodeCut(block_keys=block_keys, concurrency=concurrency, window=window, per_row=per_row)
    tokens, slots = [row + 100 for row in range(len(lengths))], [row + 200 for row in range(len(lengths))]
    parts = build_decode_parts(lengths, tokens, slots, cut)
    assert parts.shape[1] == PART_FIELDS
    assert len(parts) <= cut.capacity(len(lengths))
    seen = [length if window is None else min(length, window) for length in lengths]
    met, row_of_before = set(), None
    for index, (token, slot, begin, end, first, count, row, _) in enumerate(parts.tolist()):
        assert (token, slot) == (row + 100, row + 200)
        assert first <= index < first + count
        if index == first:
            assert begin == lengths[row] - seen[row]
            assert row_of_before is None or seen[row] <= seen[row_of_before]
            met.add(row)
            row_of_before = row
        else:
            assert begin == parts[index - 1, 3]
        if index == first + count - 1:
            assert end == lengths[row]
        assert (end - begin) % block_keys == 0 or end == lengths[row]
        assert end > begin or lengths[row] == 0
    assert met == {*range(len(lengths))}


@given(lengths=st.lists(st.integers(0, 3000), min_size=1, max_size=20))
def test_batch_invariant_parts_of_a_row_do_not_depend_on_the_others(lengths: list[int]) -> None:
    cut = DecodeCut(block_keys=64, concurrency=24, per_row=4)
    together = build_decode_parts(lengths, [0] * len(lengths), [0] * len(lengths), cut)
    for row, length in enumerate(lengths):
        alone = build_decode_parts([length], [0], [0], cut)
        own = together[together[:, 6] == row]
        assert np.array_equal(own[:, [2, 3, 5]], alone[:, [2, 3, 5]])
