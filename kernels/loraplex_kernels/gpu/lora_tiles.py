"""From the records of a step's rows to its tiles: host arithmetic, vectorised, before each step.

Knows no device: the caller copies the arrays into the buffers of ``lora.LoraTiles``. Called by model_runner.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MAX_RANK = 64
"""Ranks of one plane."""

NUM_MODULES = 7
"""q, k, v, o, gate, up, down."""

Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class TileArrays:
    """The arrays of ``LoraTiles`` in host memory, int32. Row i of ``fields`` is one of its tensors."""

    fields: Int32Array
    """(4, num_tiles): record, row, count, planes."""
    token_record: Int32Array
    """(T,)"""
    num_live: int
    """Tiles that hold tokens; the rest, up to num_tiles, are dead."""


def build_tiles(
    row_record: Int32Array, row_planes: Int32Array, row_tokens: Int32Array, tile_rows: int, num_tiles: int | None = None
) -> TileArrays:
    """Cuts each run of rows with one record into tiles of up to ``tile_rows`` tokens.

    ``row_record``, ``row_planes``, ``row_tokens``: (rows,) each: record (-1: none), its planes, tokens of the row in
    the step (>= 1; decode: 1). Rows of one record should be neighbours: every change of record starts a tile.
    ``num_tiles``: pads with dead tiles (a graph's bucket). ValueError when there are more live ones.

    >>> tiles = build_tiles(np.array([-1, 4, 4, 9]), np.array([0, 1, 1, 2]), np.array([1, 10, 10, 3]), 16, 5)
    >>> tiles.fields.tolist()
    [[-1, 4, 4, 9, -1], [0, 1, 17, 21, 0], [1, 16, 4, 3, 0], [0, 1, 1, 2, 0]]
    """
    num_rows = len(row_record)
    token_record = np.repeat(row_record, row_tokens).astype(np.int32, copy=False)
    if num_rows == 0:
        return TileArrays(fields=_dead(num_tiles or 0), token_record=token_record, num_live=0)
    first_row = np.flatnonzero(np.concatenate(([True], row_record[1:] != row_record[:-1])))
    run_tokens = np.add.reduceat(row_tokens, first_row).astype(np.int64)
    run_tiles = -(-run_tokens // tile_rows)
    num_live = int(run_tiles.sum())
    if num_tiles is not None and num_live > num_tiles:
        raise ValueError(f"{num_live} tiles do not fit in {num_tiles}")
    run_of = np.repeat(np.arange(len(first_row)), run_tiles)
    first_token = np.cumsum(run_tokens) - run_tokens
    offset = (np.arange(num_live) - (np.cumsum(run_tiles) - run_tiles)[run_of]) * tile_rows
    fields = _dead(num_live if num_tiles is None else num_tiles)
    live = fields[:, :num_live]
    live[0] = row_record[first_row][run_of]
    live[1] = first_token[run_of] + offset
    live[2] = np.minimum(run_tokens[run_of] - offset, tile_rows)
    live[3] = row_planes[first_row][run_of]
    return TileArrays(fields=fields, token_record=token_record, num_live=num_live)


def shared_tiles(num_rows: int) -> int:
    """The most tiles of 16 rows for which they suit a decode step of ``num_rows``: two rows or fewer of each adapter
    are better off in tiles of one row."""
    return (num_rows - 1) // 2


def decode_tile_rows(num_rows: int, num_tiles: int) -> int:
    """Rows of a tile that suit a decode step of ``num_rows``, which in tiles of 16 rows are ``num_tiles``: 1 or 16."""
    return 16 if num_tiles <= shared_tiles(num_rows) else 1


def mixed_tile_rows(num_tokens: int) -> int:
    """Rows of a tile that suit a step of ``num_tokens`` with prompts in it: 16, 32 or 64. In a small one most tiles
    hold a decode row, and a program takes the longer for it the more rows it is for; in a large one tiles of more rows
    read an adapter less often."""
    if num_tokens <= 384:
        return 16
    return 32 if num_tokens <= 1024 else 64


def _dead(num_tiles: int) -> Int32Array:
    fields = np.zeros((4, num_tiles), dtype=np.int32)
    fields[0] = -1
    return fields
