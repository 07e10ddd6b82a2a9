"""Reads traces back: our own files and public ones, from a file, a folder, a glob or a pyarrow.fs URL, as a stream.

Called by ``arrivals`` and ``stats`` and by whoever plans from traffic. May run beside a writer of the same folder.
"""

import glob
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from loraplex.core.errors import NotFound, Unavailable
from loraplex.object_storage.retry import is_transient
from loraplex.traces.order import require_valid_rows
from loraplex.traces.parquet import iter_tables, read_table
from loraplex.traces.schema import request_keys, to_trace_schema
from loraplex.traces.storage import RETRY, TraceFile, TraceFolder, resolve, without_replaced

R = TypeVar("R")
_SNAPSHOT_ATTEMPTS = 50
_NOT_TRACES = (".", "_", "damaged-")


def read_traces(
    path: str | os.PathLike[str],
    *,
    columns: Collection[str] | None = None,
    batch_rows: int = 65536,
    modified_after_s: float = 0.0,
    unwritten: pa.Table | None = None,
) -> Iterator[pa.Table]:
    """Tables in TRACE_SCHEMA, at most ``batch_rows`` rows each, in file order (nearly, not exactly, arrival order).

    ``columns``: read only these (and always ``arrival_s``); the others come back null. What a public file
    (``timestamp_s``, ``tenant``, ``adapter``, ``prompt_tokens``, ``output_tokens``) does not say is null, and its
    arrivals count from 0 instead of 1970. ``modified_after_s``: of a folder, leave out files of ours that were finished
    before this Unix time, and so hold only rows of requests that ended before it. ``unwritten``: rows in TRACE_SCHEMA
    that come last, but for those that the files hold by now.
    Raises NotFound when there is no trace file, InvalidInput naming the file when one is damaged or not a trace and
    naming the row (counted from 0) when its time or one of its token counts cannot be, Unavailable when a writer
    changes the folder faster than it can be listed, or when the store does not answer.
    """
    if unwritten is not None:
        columns = None if columns is None else {*columns, "request_id"}
        tables = read_traces(path, columns=columns, batch_rows=batch_rows, modified_after_s=modified_after_s)
        yield from _with_unwritten(tables, unwritten)
        return
    wanted = None if columns is None else {"arrival_s", *columns}
    text = os.fspath(path)
    if "://" not in text and glob.has_magic(text) and not os.path.exists(text):
        matches = sorted(match for match in glob.glob(text, recursive=True) if os.path.isfile(match))
        if not matches:
            raise NotFound(f"no trace file matches {text}")
        filesystem = pafs.LocalFileSystem()
        for match in matches:
            yield from _read_file(filesystem, os.path.abspath(match), wanted, batch_rows)
        return
    filesystem, resolved = resolve(text)
    info = _asked(partial(filesystem.get_file_info, resolved))
    if info.type == pafs.FileType.File:
        yield from _read_file(filesystem, resolved, wanted, batch_rows)
    elif info.type == pafs.FileType.Directory:
        yield from _read_folder(TraceFolder(filesystem, resolved), wanted, batch_rows, modified_after_s)
    else:
        raise NotFound(f"no trace at {text}")


def _with_unwritten(tables: Iterator[pa.Table], unwritten: pa.Table) -> Iterator[pa.Table]:
    """Files tell more of a request than whoever has not written it yet, so their rows stay. There need be no file."""
    times_s = unwritten.column("arrival_s")
    written: set[tuple[float, str | None]] = set()
    try:
        for table in tables:
            yield table
            written.update(request_keys(table.filter(pc.is_in(table.column("arrival_s"), value_set=times_s))))
    except NotFound:
        if not unwritten.num_rows:
            raise
    yield unwritten.filter(pa.array([key not in written for key in request_keys(unwritten)], pa.bool_()))


def _read_file(
    filesystem: pafs.FileSystem, path: str, columns: Collection[str] | None, batch_rows: int
) -> Iterator[pa.Table]:
    first_row = 0
    for raw in iter_tables(filesystem, path, columns=columns, batch_rows=batch_rows):
        table = to_trace_schema(raw, where=f"trace file {path}")
        require_valid_rows(table, where=f"trace file {path}", first_row=first_row)
        first_row += table.num_rows
        yield table


def _read_folder(
    folder: TraceFolder, columns: Collection[str] | None, batch_rows: int, modified_after_s: float
) -> Iterator[pa.Table]:
    snapshot = _snapshot(folder)
    if not snapshot.files and not snapshot.others:
        raise NotFound(f"no trace files in {folder.path}")
    for name in snapshot.others:
        yield from _read_file(folder.filesystem, folder.path_of(name), columns, batch_rows)
    for file in snapshot.files:
        path = folder.path_of(file.name)
        if 0 < file.modified_s < modified_after_s:
            continue
        if file.is_part:
            yield to_trace_schema(snapshot.parts[file.name], where=f"trace file {path}")
            continue
        try:
            yield from _read_file(folder.filesystem, path, columns, batch_rows)
        except FileNotFoundError:
            continue  # retention took it since the listing


def _asked(question: Callable[[], R]) -> R:
    """Of the store; Unavailable when it does not answer for long."""
    try:
        return RETRY.call(question)
    except OSError as error:
        if not is_transient(error):
            raise
        raise Unavailable("the store of the traces does not answer") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Snapshot:
    files: list[TraceFile]
    """Ours, oldest first, without those whose rows are in another."""
    parts: dict[str, pa.Table]
    """The rows of every part among ``files``."""
    others: list[str]
    """Names of Parquet files that a writer did not make, such as public traces; sorted."""


def _snapshot(folder: TraceFolder) -> _Snapshot:
    """A consistent view beside a running writer.

    A merge makes a trace file, then deletes its parts; one pass over the folder may see neither. Two passes that agree
    cannot both have missed the trace file. Parts are read at once; when one is gone already, all is done again.
    """
    before = _asked(folder.listing)
    for _ in range(_SNAPSHOT_ATTEMPTS):
        listing = _asked(folder.listing)
        if {file.name for file in listing[0]} == {file.name for file in before[0]}:
            files, _replaced = without_replaced(listing[0])
            try:
                parts = {
                    file.name: read_table(folder.filesystem, folder.path_of(file.name))
                    for file in files
                    if file.is_part
                }
            except FileNotFoundError:
                listing = _asked(folder.listing)
            else:
                others = [name for name in listing[1] if name.endswith(".parquet") and not name.startswith(_NOT_TRACES)]
                return _Snapshot(files=files, parts=parts, others=sorted(others))
        before = listing
    raise Unavailable(f"the trace files in {folder.path} change faster than they can be read")
