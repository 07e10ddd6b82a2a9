"""CSV, JSON lines, npz and Parquet files as streams of tables. Knows no trace format.

``.gz`` and other endings of compressed files that pyarrow knows are read as what they hold.
"""

import io
import json
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.fs as pafs
import pyarrow.json
import pyarrow.parquet as pq

from loraplex.core.errors import InvalidInput, NotFound
from loraplex.traces.storage import resolve

BATCH_ROWS = 1 << 16
_BLOCK_BYTES = 1 << 22
_MAX_FIRST_LINE_BYTES = 1 << 24
_COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")


class RawFile:
    """One file of a known kind. Every method opens it anew. ``path``: local or a pyarrow.fs URL."""

    def __init__(self, path: str) -> None:
        """Raises NotFound, or InvalidInput for a kind of file that is not read."""
        self.where = path
        self._filesystem, self._path = resolve(path)
        if self._filesystem.get_file_info(self._path).type != pafs.FileType.File:
            raise NotFound(f"no trace file at {path}")
        suffixes = PurePosixPath(self._path.lower()).suffixes
        kind = next((suffix for suffix in reversed(suffixes) if suffix not in _COMPRESSED), "")
        kinds: dict[str, type[_Reader]] = {
            ".csv": _Csv,
            ".txt": _Csv,
            ".jsonl": _JsonLines,
            ".json": _JsonLines,
            ".npz": _Npz,
            ".parquet": _Parquet,
        }
        if kind not in kinds:
            raise InvalidInput(f"{path}: not one of {', '.join(kinds)}", code="invalid_trace")
        self._reader = kinds[kind](self._filesystem, self._path)

    def columns(self) -> list[str]:
        """Their names (JSON lines: of the first line). Raises InvalidInput naming the file when it is damaged."""
        with _reported(self.where):
            return self._reader.columns()

    def tables(self, types: Mapping[str, pa.DataType]) -> Iterator[pa.Table]:
        """These columns as these types, about 65,536 rows at a time. Raises InvalidInput as ``columns``."""
        with _reported(self.where):
            for table in self._reader.tables(types):
                yield _cast(table, types)


@contextmanager
def _reported(where: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InvalidInput(f"{where}: {reason}", code="invalid_trace") from error


def _cast(table: pa.Table, types: Mapping[str, pa.DataType]) -> pa.Table:
    columns = {}
    for name, wanted in types.items():
        try:
            columns[name] = table.column(name).cast(wanted)
        except pa.ArrowException as error:
            raise ValueError(f"column {name!r} as {wanted}: {error}") from error
    return pa.table(columns)


class _Reader(ABC):
    def __init__(self, filesystem: pafs.FileSystem, path: str) -> None:
        self._filesystem = filesystem
        self._path = path

    @abstractmethod
    def columns(self) -> list[str]: ...

    @abstractmethod
    def tables(self, types: Mapping[str, pa.DataType]) -> Iterator[pa.Table]: ...


class _Csv(_Reader):
    def columns(self) -> list[str]:
        with self._filesystem.open_input_stream(self._path) as source, self._open(source, {}) as reader:
            names: list[str] = reader.schema.names
            return names

    def tables(self, types: Mapping[str, pa.DataType]) -> Iterator[pa.Table]:
        with self._filesystem.open_input_stream(self._path) as source, self._open(source, types) as reader:
            for batch in reader:
                yield pa.Table.from_batches([batch])

    def _open(self, source: IO[bytes], types: Mapping[str, pa.DataType]) -> Any:
        return pa.csv.open_csv(
            source,
            read_options=pa.csv.ReadOptions(block_size=_BLOCK_BYTES, use_threads=False),
            convert_options=pa.csv.ConvertOptions(column_types=dict(types), include_columns=list(types) or None),
        )


class _JsonLines(_Reader):
    def columns(self) -> list[str]:
        with self._filesystem.open_input_stream(self._path) as source:
            line = io.BufferedReader(source).readline(_MAX_FIRST_LINE_BYTES)
        first = json.loads(line)
        if not isinstance(first, dict):
            raise ValueError("the first line is no JSON object")
        return list(first)

    def tables(self, types: Mapping[str, pa.DataType]) -> Iterator[pa.Table]:
        options = pa.json.ParseOptions(
            explicit_schema=pa.schema(list(types.items())), unexpected_field_behavior="ignore"
        )
        read = pa.json.ReadOptions(block_size=_BLOCK_BYTES, use_threads=False)
        with (
            self._filesystem.open_input_stream(self._path) as source,
            pa.json.open_json(source, read_options=read, parse_options=options) as reader,
        ):
            for batch in reader:
                yield pa.Table.from_batches([batch])


class _Parquet(_Reader):
    def columns(self) -> list[str]:
        with self._filesystem.open_input_file(self._path) as source, pq.ParquetFile(source, pre_buffer=False) as file:
            names: list[str] = file.schema_arrow.names
            return names

    def tables(self, types: Mapping[str, pa.DataType]) -> Iterator[pa.Table]:
        with self._filesystem.open_input_file(self._path) as source, pq.ParquetFile(source, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=list(types)):
                yield pa.Table.from_batches([batch])


class _Npz(_Reader):
    """Arrays of one length, each a column; read piece by piece, so an archive may be larger than memory."""

    def columns(self) -> list[str]:
        with self._filesystem.open_input_file(self._path) as source, zipfile.ZipFile(source) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]

    def tables(self, types: Mapping[str, pa.DataType]) -> Iterator[pa.Table]:
        with self._filesystem.open_input_file(self._path) as source, zipfile.ZipFile(source) as archive:
            streams = {name: archive.open(f"{name}.npy") for name in types}
            heads = {name: _npy_head(stream, name) for name, stream in streams.items()}
            lengths = {length for length, _ in heads.values()}
            if len(lengths) != 1:
                raise ValueError(f"arrays of different lengths: {sorted(lengths)}")
            (left,) = lengths
            while left:
                rows = min(left, BATCH_ROWS)
                left -= rows
                yield pa.table({name: _npy_rows(streams[name], heads[name][1], rows) for name in types})


def _npy_head(stream: IO[bytes], name: str) -> tuple[int, np.dtype[Any]]:
    """(length, dtype). Raises ValueError for what is no plain vector."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    if len(shape) != 1 or dtype.hasobject:
        raise ValueError(f"array {name!r} is {dtype} of shape {shape}, expected numbers or text of one dimension")
    return shape[0], dtype


def _npy_rows(stream: IO[bytes], dtype: np.dtype[Any], rows: int) -> pa.Array:
    data = stream.read(rows * dtype.itemsize)
    if len(data) != rows * dtype.itemsize:
        raise ValueError("the archive ends too early")
    values = np.frombuffer(data, dtype=dtype)
    if dtype.kind == "U":
        return pa.array(values.tolist(), pa.string())
    return pa.array(values.astype(dtype.newbyteorder("=")))
