"""Parquet bytes of trace tables: how they are compressed, and how a broken file is reported.

Called by writer and reader.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from loraplex.core.errors import InvalidInput, Unavailable
from loraplex.object_storage.retry import is_transient
from loraplex.traces.storage import RETRY

_PUBLIC_NAMES = {"timestamp_s": "arrival_s", "adapter": "adapter_name"}
"""The schema of public trace files (timestamp_s, tenant, adapter, prompt_tokens, output_tokens), in our words."""


def to_parquet(table: pa.Table) -> pa.Buffer:
    """The whole file as one buffer: a trace file is tens of MB at most and must appear at once."""
    sink = pa.BufferOutputStream()
    pq.write_table(table.unify_dictionaries(), sink, compression="zstd", row_group_size=65536)
    return sink.getvalue()


def iter_tables(
    filesystem: pafs.FileSystem, path: str, *, columns: Collection[str] | None, batch_rows: int
) -> Iterator[pa.Table]:
    """Tables of at most ``batch_rows`` rows with our column names, types as in the file.

    ``columns``: the only ones to read, in our words; those that the file lacks are left out; None reads all.
    Raises InvalidInput naming the file when it is not Parquet or is damaged; FileNotFoundError when it is gone;
    Unavailable when its store does not answer.
    """
    # pre_buffer would keep the whole file's columns in memory until the end.
    opened = partial(filesystem.open_input_file, path)
    with _reported(path), RETRY.call(opened) as source, pq.ParquetFile(source, pre_buffer=False) as file:
        in_file = file.schema_arrow.names
        ours = {name: name if "arrival_s" in in_file else _PUBLIC_NAMES.get(name, name) for name in in_file}
        wanted = [name for name in in_file if columns is None or ours[name] in columns]
        for batch in file.iter_batches(batch_size=batch_rows, columns=wanted):
            table = pa.Table.from_batches([batch]).rename_columns([ours[name] for name in wanted])
            yield table.replace_schema_metadata(file.schema_arrow.metadata)


def read_table(filesystem: pafs.FileSystem, path: str) -> pa.Table:
    """The whole file. Errors as in ``iter_tables``."""

    def attempt() -> pa.Table:
        with filesystem.open_input_file(path) as source:
            return pq.read_table(source)

    with _reported(path):
        return RETRY.call(attempt)


@contextmanager
def _reported(path: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, GeneratorExit):
        raise
    except (pa.ArrowException, OSError, EOFError) as error:
        if isinstance(error, OSError) and is_transient(error):
            raise Unavailable(f"trace file {path}: the object store does not answer") from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InvalidInput(f"trace file {path}: {reason}", code="invalid_trace") from error
