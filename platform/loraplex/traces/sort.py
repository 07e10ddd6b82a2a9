"""Sorts a trace of any size by arrival in bounded memory: sorted runs on disk, then a merge of all runs at once."""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

RUN_ROWS = 1 << 20
_BLOCK_ROWS = 1 << 14


def sort_by_arrival(tables: Iterable[pa.Table], *, run_rows: int = RUN_ROWS) -> Iterator[pa.Table]:
    """The same rows by ``arrival_s``; equal times keep their order.

    Holds ``run_rows`` rows and, while merging, 16,384 rows for each run; the runs lie in a temporary folder meanwhile.
    """
    with tempfile.TemporaryDirectory(prefix="loraplex-sort-") as folder:
        paths: list[Path] = []
        held: list[pa.Table] = []
        held_rows = 0
        for table in tables:
            held.append(table)
            held_rows += table.num_rows
            if held_rows >= run_rows:
                paths.append(_write_run(sorted_by_arrival(held), Path(folder) / f"{len(paths)}.arrow"))
                held, held_rows = [], 0
        last = [_blocks(sorted_by_arrival(held))] if held_rows else []
        yield from merge_by_arrival([*(_read_run(path) for path in paths), *last])


def merge_by_arrival(runs: Sequence[Iterator[pa.Table]]) -> Iterator[pa.Table]:
    """Merges runs that are sorted by ``arrival_s``; equal times in order of the runs. Holds about a block of each."""
    heads = [_Head(run) for run in runs]
    while heads:
        # What is earlier than the end of every unfinished block cannot be preceded by anything still to be read.
        limit_s = min((head.last_s for head in heads if not head.finished), default=np.inf)
        ready = [rows for head in heads if (rows := head.take_before(limit_s)).num_rows]
        for head in heads:
            if not head.finished and head.last_s == limit_s:
                head.extend()
        heads = [head for head in heads if head.rows.num_rows]
        if ready:
            yield sorted_by_arrival(ready)


class _Head:
    """The rows of a run that are read and not yet handed on."""

    def __init__(self, run: Iterator[pa.Table]) -> None:
        self._run = run
        self.rows: pa.Table = next(run)
        self.finished = False

    @property
    def last_s(self) -> float:
        return float(self.rows.column("arrival_s")[-1].as_py())

    def take_before(self, limit_s: float) -> pa.Table:
        count = int(np.searchsorted(self.rows.column("arrival_s").to_numpy(), limit_s, side="left"))
        taken, self.rows = self.rows.slice(0, count), self.rows.slice(count)
        return taken

    def extend(self) -> None:
        more = next(self._run, None)
        if more is None:
            self.finished = True
        else:
            self.rows = pa.concat_tables([self.rows, more])


def sorted_by_arrival(tables: Sequence[pa.Table]) -> pa.Table:
    """One table with the rows of all, by ``arrival_s``; equal times keep their order."""
    table = pa.concat_tables(tables).unify_dictionaries().combine_chunks()
    return table.take(pa.array(np.argsort(table.column("arrival_s").to_numpy(), kind="stable")))


def _blocks(table: pa.Table) -> Iterator[pa.Table]:
    for start in range(0, table.num_rows, _BLOCK_ROWS):
        yield table.slice(start, _BLOCK_ROWS)


def _write_run(table: pa.Table, path: Path) -> Path:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as file:
        file.write_table(table, max_chunksize=_BLOCK_ROWS)
    return path


def _read_run(path: Path) -> Iterator[pa.Table]:
    with pa.OSFile(str(path), "rb") as source, pa.ipc.open_file(source) as file:
        for index in range(file.num_record_batches):
            yield pa.Table.from_batches([file.get_batch(index)])
