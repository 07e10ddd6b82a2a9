"""Turns many small part files into few trace files and keeps the folder within its size. Run by the writer's thread.

Safe at any crash: a trace file appears whole, its name says which parts it replaces, and only then are those deleted.
Two writers on one folder may adopt the same parts: both produce the same file.
"""

import logging
from itertools import groupby

import pyarrow as pa

from loraplex.core.errors import InvalidInput
from loraplex.traces.parquet import read_table, to_parquet
from loraplex.traces.schema import to_trace_schema
from loraplex.traces.storage import TraceFile, TraceFolder, trace_name, without_replaced

_log = logging.getLogger(__name__)


def merge_parts(folder: TraceFolder, parts: list[TraceFile]) -> None:
    """Writes one trace file for ``parts`` (all of one run), then deletes them. Nothing happens with no parts.

    A damaged part is set aside and logged. Raises OSError, with every part still in place, when one is missing
    (another writer was faster: what this one would write could lack rows) or the file cannot be written, Unavailable
    when the store does not answer.
    """
    if not parts:
        return
    parts = sorted(parts, key=lambda part: part.first)
    run = parts[0].run
    tables = []
    for part in parts:
        path = folder.path_of(part.name)
        try:
            tables.append(to_trace_schema(read_table(folder.filesystem, path), where=path))
        except InvalidInput as error:
            _log.error("setting a damaged trace part aside: %s", error.message)
            folder.set_aside(part.name)
    if tables:
        name = trace_name(run, parts[0].first, parts[-1].last)
        folder.write(name, run, to_parquet(pa.concat_tables(tables)))
    for part in parts:
        try:
            folder.delete(part.name)
        except OSError as error:
            # Harmless: readers skip it by name, and the next tidying tries again.
            _log.warning("cannot delete the merged trace part %s: %s", part.name, error)


def adopt_orphans(folder: TraceFolder, *, own_run: str, still_since_s: float) -> None:
    """Merges parts of other runs whose newest part is older than ``still_since_s`` (wall clock), and deletes files
    that a finished merge has replaced. Raises OSError."""
    kept, replaced = without_replaced(folder.files())
    for file in replaced:
        folder.delete(file.name)
    others = [file for file in kept if file.run != own_run]
    for _, files_of_run in groupby(others, key=lambda file: file.run):
        files = list(files_of_run)
        if max(file.modified_s for file in files) > still_since_s:
            continue
        for is_part, stretch in groupby(files, key=lambda file: file.is_part):
            if is_part:
                merge_parts(folder, list(stretch))


def delete_oldest(folder: TraceFolder, *, own_run: str, max_total_bytes: int) -> int:
    """Deletes the oldest files until the rest fits; the running writer's parts stay. Returns how many went."""
    files = sorted(folder.files(), key=lambda file: file.sort_key)
    total = sum(file.num_bytes for file in files)
    deleted = 0
    for file in files:
        if total <= max_total_bytes:
            break
        if file.is_part and file.run == own_run:
            continue
        folder.delete(file.name)
        total -= file.num_bytes
        deleted += 1
    if deleted:
        _log.info("trace retention: deleted the %d oldest files, %d bytes remain", deleted, total)
    return deleted
