"""Puts a stream of trace tables into arrival order, or says which row is out of it. Bounded memory.

A gateway writes a row when its answer ends, so recorded rows are up to an answer's length out of order and are sorted
here through a buffer. Rows without ``e2e_s`` have no such excuse: there a step back in time is an error. Called by
whoever walks a trace in time.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from loraplex.core.errors import InvalidInput
from loraplex.traces.sort import sorted_by_arrival

MAX_DISORDER_S = 3600.0
"""Recorded rows may come this much later than one that arrived after them ..."""
MAX_HELD_ROWS = 1 << 19
"""... and no more than about this many rows are held back to wait for them."""


def in_arrival_order(tables: Iterable[pa.Table], *, where: str) -> Iterator[pa.Table]:
    """The same rows in TRACE_SCHEMA by ``arrival_s``; equal times keep their order.

    ``tables`` must have ``e2e_s`` read. Raises InvalidInput naming ``where`` and the row, counted from 0.
    """
    held: list[pa.Table] = []
    held_rows = 0
    newest_s = emitted_s = -np.inf
    first_row = 0
    for table in tables:
        if not table.num_rows:
            continue
        times_s = _times(table)
        if not held and not _is_recorded(table):
            _require_order(times_s, emitted_s, where, first_row)
            emitted_s = newest_s = float(times_s[-1])
            first_row += len(times_s)
            yield table
            continue
        late = np.flatnonzero(times_s < emitted_s)
        if len(late):
            raise _out_of_order(where, first_row + int(late[0]), float(times_s[late[0]]), float(emitted_s))
        first_row += len(times_s)
        newest_s = max(newest_s, float(times_s.max()))
        held.append(table)
        held_rows += table.num_rows
        if held_rows >= MAX_HELD_ROWS:
            ready = sorted_by_arrival(held)
            ready_s = _times(ready)
            count = max(int(np.searchsorted(ready_s, newest_s - MAX_DISORDER_S)), held_rows // 2)
            emitted_s = float(ready_s[count - 1])
            yield ready.slice(0, count)
            held = [ready.slice(count)]
            held_rows -= count
    if held:
        yield sorted_by_arrival(held)


def _times(table: pa.Table) -> npt.NDArray[np.float64]:
    times_s: npt.NDArray[np.float64] = table.column("arrival_s").to_numpy()
    return times_s


def _is_recorded(table: pa.Table) -> bool:
    return bool(table.column("e2e_s").null_count < table.num_rows)


def _require_order(times_s: npt.NDArray[np.float64], after_s: float, where: str, first_row: int) -> None:
    back = np.flatnonzero(np.diff(times_s, prepend=after_s if np.isfinite(after_s) else times_s[0]) < 0)
    if len(back):
        row = int(back[0])
        before_s = float(times_s[row - 1]) if row else after_s
        raise _out_of_order(where, first_row + row, float(times_s[row]), before_s)


def _out_of_order(where: str, row: int, at_s: float, before_s: float) -> InvalidInput:
    back = f"row {row} arrives at {at_s!r} s, after one at {before_s!r} s"
    return InvalidInput(f"{where}: {back}; `loraplex trace convert --sort` sorts it", code="invalid_trace")


def require_valid_rows(table: pa.Table, *, where: str, first_row: int) -> None:
    """Raises InvalidInput naming the row for a time that is negative or no number, and for negative token counts."""
    times_s = _times(table)
    bad = np.flatnonzero(~(np.isfinite(times_s) & (times_s >= 0)))
    if len(bad):
        raise InvalidInput(
            f"{where}: row {first_row + int(bad[0])} has arrival time {float(times_s[bad[0]])!r}", code="invalid_trace"
        )
    for name in ("prompt_tokens", "cached_tokens", "output_tokens"):
        column = table.column(name)
        if column.null_count == table.num_rows:
            continue
        smallest = pc.min(column).as_py()
        if smallest < 0:
            row = pc.index(pc.fill_null(pc.less(column, 0), False), True).as_py()
            value = column[row].as_py()
            raise InvalidInput(f"{where}: row {first_row + row} has {name} {value}", code="invalid_trace")
