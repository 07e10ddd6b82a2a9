"""What each program of the attention kernels does: host arithmetic, vectorised, before each step.

Knows no device: the caller copies the arrays to it. Called by model_runner. Legend: B rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

PART_FIELDS = 8
"""Of a part of a decode row: its token, slot, first key, end of its keys, the row's first part, the row's parts (0:
nothing is to be done), the row, unused."""

BLOCK_PARTS = 16
"""Parts of a row that are added up at a time."""

_PROGRAMS_PER_SM = 2
_MAX_CONCURRENCY = 128
_FINENESS = 1.5
"""Where contexts of any length are cut, parts are as long as all keys over so many times the concurrency."""
_LIKE = 0.9
"""Contexts are of like length from this share of the longest on."""
_MANY_KEYS = 16384
"""In a context of so many keys a second round of adding up its parts is little."""

Int32Array = npt.NDArray[np.int32]
_Int64Array = npt.NDArray[np.int64]
_Ints = Sequence[int] | npt.NDArray[np.integer]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeCut:
    """How the contexts of a step's decode rows are cut into parts, one program for each and KV head.

    Contexts of like length that keep the GPU busy stay whole. Where they are few, or some are much longer than the
    others, all but a few programs would be done early: the long ones are cut.
    """

    block_keys: int
    """Keys that a program takes at a time: parts are multiples, but for a row's last."""
    concurrency: int
    """Parts that the GPU works on at a time. Half of them suffice to keep its memory busy."""
    window: int | None = None
    """Keys that a query sees, itself included; None: all."""
    per_row: int | None = None
    """Batch-invariant: a row is cut into so many parts whatever the others are."""

    @property
    def finest(self) -> int:
        """All keys over the length of the shortest parts."""
        return int(_FINENESS * self.concurrency)

    def capacity(self, num_rows: int) -> int:
        """The most parts that ``num_rows`` have."""
        return num_rows + self.finest if self.per_row is None else num_rows * self.per_row


def decode_concurrency(num_kv_heads: int, num_sms: int) -> int:
    """``DecodeCut.concurrency`` of a GPU."""
    return max(1, min(_MAX_CONCURRENCY, _PROGRAMS_PER_SM * num_sms // num_kv_heads))


def build_decode_parts(context_len: _Ints, tokens: _Ints, slots: _Ints, cut: DecodeCut) -> Int32Array:
    """(parts, PART_FIELDS) int32, those of the longest rows first; at most ``cut.capacity`` of the rows.

    ``context_len``: (B,) keys of each row, the query's own, which is the last, included; a row of 0 (padding) is one
    part that writes zeros. ``tokens``, ``slots``: (B,) of the queries in the step, and of their page tables.

    >>> build_decode_parts([100, 9], [0, 5], [7, 3], DecodeCut(block_keys=32, concurrency=2)).tolist()
    [[0, 7, 0, 64, 0, 2, 0, 0], [0, 7, 64, 100, 0, 2, 0, 0], [5, 3, 0, 9, 2, 1, 1, 0]]
    """
    length_B = np.asarray(context_len, dtype=np.int64)
    seen_B = length_B if cut.window is None else np.minimum(length_B, cut.window)
    per_part_B, parts_B = _parts(seen_B, cut)
    order_B = np.argsort(-seen_B, kind="stable")
    counts_B = parts_B[order_B]
    row_P = np.repeat(order_B, counts_B)
    first_P = np.repeat(np.cumsum(counts_B) - counts_B, counts_B)
    begin_P = (length_B - seen_B)[row_P] + (np.arange(len(row_P)) - first_P) * per_part_B[row_P]
    parts = np.zeros((len(row_P), PART_FIELDS), dtype=np.int32)
    parts[:, 0] = np.asarray(tokens, dtype=np.int64)[row_P]
    parts[:, 1] = np.asarray(slots, dtype=np.int64)[row_P]
    parts[:, 2] = begin_P
    parts[:, 3] = np.minimum(begin_P + per_part_B[row_P], length_B[row_P])
    parts[:, 4] = first_P
    parts[:, 5] = parts_B[row_P]
    parts[:, 6] = row_P
    return parts


def _parts(seen_B: _Int64Array, cut: DecodeCut) -> tuple[_Int64Array, _Int64Array]:
    """(B,) each: keys of a row's parts but the last, and how many those are."""
    if cut.per_row is None:
        at_most = _longest_part(seen_B, cut)
        per_part_B = -(-seen_B // np.maximum(1, -(-seen_B // at_most)))
    else:
        per_part_B = -(-seen_B // cut.per_row)
    per_part_B = np.maximum(1, -(-per_part_B // cut.block_keys)) * cut.block_keys
    return per_part_B, np.maximum(1, -(-seen_B // per_part_B))


def _longest_part(seen_B: _Int64Array, cut: DecodeCut) -> int:
    total, longest = int(seen_B.sum()), int(seen_B.max(initial=0))
    if longest == 0:
        return 1
    num_like = int(np.count_nonzero(seen_B >= _LIKE * longest))
    if longest * cut.concurrency <= total or 2 * num_like > cut.concurrency:
        return longest
    if total <= num_like * longest / _LIKE:
        # Hardly more than these: all parts run at a time.
        share = -(-longest // (cut.concurrency // num_like))
    else:
        share = -(-total // cut.finest)
    most_parts = BLOCK_PARTS if longest < _MANY_KEYS else 2 * BLOCK_PARTS
    return max(share, -(-longest // most_parts))


def build_prefill_tiles(
    starts: _Ints, num_tokens: _Ints, first_tokens: _Ints, slots: _Ints, block_tokens: int
) -> Int32Array:
    """Cuts each row's tokens into tiles: (tiles, 4) int32 of first token in the step, tokens, position, slot.

    ``starts``: position of each row's first token; ``first_tokens``: that token's index in the step. The tiles that
    see most keys come first, so that none of them starts when the others are done. For (0,), (40,), (8,), (3,) and
    32 tokens: [[40, 8, 32, 3], [8, 32, 0, 3]].
    """
    counts_R = np.asarray(num_tokens, dtype=np.int64)
    tiles_R = -(-counts_R // block_tokens)
    row_X = np.repeat(np.arange(len(counts_R)), tiles_R)
    skipped_X = (np.arange(len(row_X)) - np.repeat(np.cumsum(tiles_R) - tiles_R, tiles_R)) * block_tokens
    tiles = np.empty((len(row_X), 4), dtype=np.int32)
    tiles[:, 0] = np.asarray(first_tokens, dtype=np.int64)[row_X] + skipped_X
    tiles[:, 1] = np.minimum(counts_R[row_X] - skipped_X, block_tokens)
    tiles[:, 2] = np.asarray(starts, dtype=np.int64)[row_X] + skipped_X
    tiles[:, 3] = np.asarray(slots, dtype=np.int64)[row_X]
    return tiles[np.argsort(-(tiles[:, 2] + tiles[:, 1]), kind="stable")]
