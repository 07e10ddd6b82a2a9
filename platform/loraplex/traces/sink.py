"""Writes one trace file as a stream: rows in arrival order, whole row groups, the file appears complete or not at all.

The same rows give the same bytes, however they were cut into tables. Called by synthesis, conversion and split.
"""

import os
from types import TracebackType

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from loraplex.core.errors import InvalidInput, NotFound
from loraplex.traces.schema import TRACE_SCHEMA
from loraplex.traces.storage import resolve

ROW_GROUP_ROWS = 1 << 16


class TraceSink:
    """A context manager: leaving it by an exception leaves no file behind. ``path``: local or a pyarrow.fs URL."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises NotFound when the folder is not there, InvalidInput when the file cannot be written."""
        self._where = os.fspath(path)
        self._filesystem, self._path = resolve(self._where)
        parent = os.path.dirname(self._path)
        if isinstance(self._filesystem, pafs.LocalFileSystem) and not os.path.isdir(parent):
            raise NotFound(f"cannot write {self._where}: no directory {parent}")
        self._temporary = os.path.join(parent, f".tmp-{os.getpid()}-{os.path.basename(self._path)}")
        self._pending: list[pa.Table] = []
        self._pending_rows = 0
        self._rows = 0
        self._writer: pq.ParquetWriter | None = None

    @property
    def rows(self) -> int:
        return self._rows

    @property
    def pending_rows(self) -> int:
        """Rows in memory: less than one row group."""
        return self._pending_rows

    def __enter__(self) -> "TraceSink":
        try:
            self._writer = pq.ParquetWriter(
                self._temporary, TRACE_SCHEMA, filesystem=self._filesystem, compression="zstd"
            )
        except OSError as error:
            raise InvalidInput(f"cannot write {self._where}: {error}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._writer is not None
        try:
            if kind is None:
                self.flush()
        finally:
            self._writer.close()
            if kind is not None:
                self._filesystem.delete_file(self._temporary)
        if kind is None:
            self._filesystem.move(self._temporary, self._path)

    def write(self, table: pa.Table) -> None:
        """``table`` in TRACE_SCHEMA."""
        self._rows += table.num_rows
        while table.num_rows:
            taken = table.slice(0, ROW_GROUP_ROWS - self._pending_rows)
            table = table.slice(taken.num_rows)
            self._pending.append(taken)
            self._pending_rows += taken.num_rows
            if self._pending_rows == ROW_GROUP_ROWS:
                self.flush()

    def flush(self) -> None:
        """Ends the row group."""
        if not self._pending_rows:
            return
        assert self._writer is not None
        table = _with_small_dictionaries(pa.concat_tables(self._pending))
        self._writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
        self._pending.clear()
        self._pending_rows = 0


def _with_small_dictionaries(table: pa.Table) -> pa.Table:
    """Dictionaries that hold the values of these rows alone, in order of appearance: bytes depend on the rows only."""
    columns = []
    for field in TRACE_SCHEMA:
        column = table.column(field.name)
        if pa.types.is_dictionary(field.type):
            column = column.cast(field.type.value_type).combine_chunks().dictionary_encode()
        columns.append(column)
    return pa.table(columns, schema=TRACE_SCHEMA)
