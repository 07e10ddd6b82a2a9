"""Cuts a trace into files: windows of time, a part to plan on and one to score on, or one file a tenant. A stream.

Rows keep all their columns. Called by ``loraplex trace split``.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pyarrow as pa

from loraplex.core.errors import BadConfig, InvalidInput, NotFound
from loraplex.traces.arrivals import ordered_tables, trace_zero_s
from loraplex.traces.names import NameTable, column_indices
from loraplex.traces.schema import TRACE_SCHEMA
from loraplex.traces.sink import TraceSink

MAX_TENANT_FILES = 256
_MAX_HELD_ROWS = 1 << 20
_COLUMNS = tuple(TRACE_SCHEMA.names)


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitFile:
    path: str
    rows: int
    start_s: float
    """Where in the source this file's second 0 lies."""


def split_windows(source: str, folder: Path, *, every_s: float) -> list[SplitFile]:
    """``window-0000.parquet`` and so on, each counting from its own start; a window without rows gives no file.

    Raises BadConfig for a window that is not longer than 0; the errors of ``iter_arrivals``.
    """
    if not (every_s > 0 and math.isfinite(every_s)):
        raise BadConfig(f"window is {every_s}, must be greater than 0", param="window")
    made: list[SplitFile] = []
    pieces = _pieces(source, every_s)
    piece = next(pieces, None)
    if piece is None:
        raise NotFound(f"trace {source} has no rows")
    while piece is not None:
        number = piece[0]
        path = folder / f"window-{number:04d}.parquet"
        with TraceSink(path) as sink:
            while piece is not None and piece[0] == number:
                sink.write(piece[1])
                piece = next(pieces, None)
        made.append(SplitFile(path=str(path), rows=sink.rows, start_s=number * every_s))
    return made


def split_train_test(source: str, folder: Path, *, train: float) -> list[SplitFile]:
    """``train.parquet`` has the first ``train`` (0 to 1) of the time, ``test.parquet`` the rest; both count from 0."""
    if not 0 < train < 1:
        raise BadConfig(f"train is {train}, must be between 0 and 1", param="train")
    first_s, last_s = _span(source)
    cut_s = first_s + train * (last_s - first_s)
    names = (("train.parquet", -math.inf, 0.0), ("test.parquet", cut_s, cut_s))
    with ExitStack() as stack:
        sinks = [stack.enter_context(TraceSink(folder / name)) for name, _, _ in names]
        for table, times_s in _timed(source):
            cut = int(np.searchsorted(times_s, cut_s, side="left"))
            sinks[0].write(_moved(table.slice(0, cut), times_s[:cut]))
            sinks[1].write(_moved(table.slice(cut), times_s[cut:] - cut_s))
    return [
        SplitFile(path=str(folder / name), rows=sink.rows, start_s=start_s)
        for (name, _, start_s), sink in zip(names, sinks, strict=True)
    ]


def split_tenants(source: str, folder: Path, *, only: Sequence[str] = ()) -> list[SplitFile]:
    """``tenant-<name>.parquet`` each, all counting as the source does; names are percent-encoded.

    ``only``: these tenants alone. Rows without a tenant are left out. Raises InvalidInput when there are more tenants
    than 256, NotFound for one of ``only`` that has no row.
    """
    tenants = NameTable[str]()
    sinks: dict[int, TraceSink] = {}
    with ExitStack() as stack:
        for table, times_s in _timed(source):
            indices = column_indices(table.column("tenant"), tenants)
            table = _moved(table, times_s)
            for index in np.unique(indices[indices >= 0]).tolist():
                name = tenants.names[index]
                if only and name not in only:
                    continue
                if index not in sinks:
                    if len(sinks) == MAX_TENANT_FILES:
                        raise InvalidInput(f"trace {source} has over {MAX_TENANT_FILES} tenants; name some of them")
                    sinks[index] = stack.enter_context(TraceSink(folder / _file_name(name)))
                sinks[index].write(table.take(pa.array(np.flatnonzero(indices == index))))
            if sum(sink.pending_rows for sink in sinks.values()) > _MAX_HELD_ROWS:
                for sink in sinks.values():
                    sink.flush()
        found = {tenants.names[index] for index in sinks}
        missing = [name for name in only if name not in found]
        if missing or not sinks:
            raise NotFound(f"trace {source} has no rows of {f'tenant {missing[0]!r}' if missing else 'any tenant'}")
    return [
        SplitFile(path=str(folder / _file_name(tenants.names[index])), rows=sink.rows, start_s=0.0)
        for index, sink in sorted(sinks.items())
    ]


def _file_name(tenant: str) -> str:
    return f"tenant-{quote(tenant, safe='')}.parquet"


def _timed(source: str) -> Iterator[tuple[pa.Table, np.ndarray[tuple[int], np.dtype[np.float64]]]]:
    """Tables in order, and their seconds in the trace."""
    zero_s: float | None = None
    for table in ordered_tables(source, _COLUMNS):
        times_s = table.column("arrival_s").to_numpy()
        if zero_s is None:
            zero_s = trace_zero_s(float(times_s[0]))
        yield table, times_s - zero_s


def _pieces(source: str, every_s: float) -> Iterator[tuple[int, pa.Table]]:
    """(window, its next rows) in order of time."""
    for table, times_s in _timed(source):
        window = np.floor(times_s / every_s).astype(np.int64)
        for number in np.unique(window).tolist():
            first, last = np.searchsorted(window, (number, number + 1))
            since_start_s = np.maximum(times_s[first:last] - number * every_s, 0.0)
            yield number, _moved(table.slice(first, last - first), since_start_s)


def _moved(table: pa.Table, times_s: np.ndarray[tuple[int], np.dtype[np.float64]]) -> pa.Table:
    return table.set_column(0, TRACE_SCHEMA.field(0), pa.array(times_s, pa.float64()))


def _span(source: str) -> tuple[float, float]:
    first_s, last_s = math.nan, math.nan
    for table in ordered_tables(source, ("arrival_s", "e2e_s")):
        times_s = table.column("arrival_s").to_numpy()
        if math.isnan(first_s):
            first_s = float(times_s[0])
        last_s = float(times_s[-1])
    if math.isnan(first_s):
        raise NotFound(f"trace {os.fspath(source)} has no rows")
    zero_s = trace_zero_s(first_s)
    return first_s - zero_s, last_s - zero_s
