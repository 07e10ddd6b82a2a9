"""The columns of a trace and their two encodings: Arrow IPC between gateway and controller, Parquet on disk.

Owns column names, types and the schema version. A batch on the wire is a stream of ended requests and, after it, one of
those that arrived, which releases that know nothing of it leave unread. Called by recorder, writer and reader.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields

import pyarrow as pa

from loraplex.core.errors import InvalidInput
from loraplex.traces.row import ArrivalRow, TraceRow

SCHEMA_VERSION = 1
"""Grows when a column changes its meaning or type. New nullable columns do not count."""
VERSION_KEY = b"loraplex.trace_schema"
_SOURCE_KEY = b"loraplex.trace_source"
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
"""Without this check a stream cut between two messages reads as a shorter one."""
_SEQUENCE_KEY = b"loraplex.trace_sequence"

_LABEL = pa.dictionary(pa.int32(), pa.string())

TRACE_SCHEMA = pa.schema(
    [
        pa.field("arrival_s", pa.float64(), nullable=False),
        pa.field("tenant", _LABEL),
        pa.field("request_id", pa.string()),
        pa.field("endpoint", _LABEL),
        pa.field("base_model_id", _LABEL),
        pa.field("adapter_name", _LABEL),
        pa.field("adapter_version", pa.int32()),
        pa.field("adapter_digest", _LABEL),
        pa.field("prompt_tokens", pa.int32()),
        pa.field("cached_tokens", pa.int32()),
        pa.field("output_tokens", pa.int32()),
        pa.field("ttft_s", pa.float64()),
        pa.field("e2e_s", pa.float64()),
        pa.field("tpot_s", pa.float64()),
        pa.field("status", pa.int16()),
        pa.field("finish_reason", _LABEL),
        pa.field("replica_id", _LABEL),
        pa.field("priority", _LABEL),
        pa.field("stream", pa.bool_()),
    ],
    metadata={VERSION_KEY: str(SCHEMA_VERSION).encode()},
)
"""All columns but the arrival may be null: a trace from elsewhere does not say everything."""

_NAMES = tuple(field.name for field in dataclass_fields(TraceRow))
assert tuple(TRACE_SCHEMA.names) == _NAMES
ARRIVAL_SCHEMA = pa.schema(
    [TRACE_SCHEMA.field(field.name) for field in dataclass_fields(ArrivalRow)], metadata=TRACE_SCHEMA.metadata
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedBatch:
    """What a controller gets from one ``record_traces`` call."""

    table: pa.Table
    """Requests that ended. In TRACE_SCHEMA."""
    arrivals: pa.Table | None
    """Requests that were let in, in TRACE_SCHEMA with null for what their end will tell. Each once, in an earlier batch
    than its end or in the same. None: the sender does not tell of arrivals."""
    source: str
    """The recorder that sent it; empty when the sender does not say."""
    sequence: int
    """Grows by one with each batch of a source; -1 when the sender does not say. A repeat is a retry."""


def rows_to_batch(rows: Sequence[TraceRow] | Sequence[ArrivalRow], schema: pa.Schema = TRACE_SCHEMA) -> pa.RecordBatch:
    """Columns of ``rows`` in ``schema``, in order. Raises InvalidInput when a value does not fit its column."""
    try:
        arrays = [pa.array([getattr(row, field.name) for row in rows], type=field.type) for field in schema]
        return pa.RecordBatch.from_arrays(arrays, schema=schema)
    except (pa.ArrowException, OverflowError, ValueError, TypeError) as error:
        raise InvalidInput(f"trace row does not fit the trace schema: {error}", code="invalid_trace") from error


def encode_batch(rows: Sequence[TraceRow], *, arrivals: Sequence[ArrivalRow] = (), source: str, sequence: int) -> bytes:
    """Two Arrow IPC streams, as ``ControlPlane.record_traces`` takes them. Raises InvalidInput as ``rows_to_batch``."""
    metadata = {**TRACE_SCHEMA.metadata, _SOURCE_KEY: source.encode(), _SEQUENCE_KEY: str(sequence).encode()}
    ended = rows_to_batch(rows).replace_schema_metadata(metadata)
    return _stream(pa.Table.from_batches([ended])) + _stream(
        pa.Table.from_batches([rows_to_batch(arrivals, ARRIVAL_SCHEMA)])
    )


def request_keys(table: pa.Table) -> Iterator[tuple[float, str | None]]:
    """What tells that two rows are of one request: its arrival and its id. [R], of a table in TRACE_SCHEMA."""
    return zip(table.column("arrival_s").to_pylist(), table.column("request_id").to_pylist(), strict=True)


def encode_table(table: pa.Table) -> bytes:
    """One Arrow IPC stream of a table in TRACE_SCHEMA, for ``decode_table``."""
    return _stream(table.unify_dictionaries())


def decode_table(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()


def _stream(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return bytes(sink.getvalue())


def decode_batch(data: bytes) -> DecodedBatch:
    """Raises InvalidInput on anything else than IPC streams of a trace schema that this version reads."""
    if not data.endswith(_END_OF_STREAM):
        raise InvalidInput("trace batch is not a whole Arrow IPC stream", code="invalid_trace")
    try:
        streams = pa.BufferReader(data)
        table = pa.ipc.open_stream(streams).read_all()
        has_more = streams.tell() < len(data)
        arrivals = pa.ipc.open_stream(streams).read_all() if has_more else None
    except (pa.ArrowException, OSError, EOFError) as error:
        raise InvalidInput(f"trace batch is not an Arrow IPC stream: {error}", code="invalid_trace") from error
    metadata = table.schema.metadata or {}
    source = metadata.get(_SOURCE_KEY, b"").decode("utf-8", "replace")
    sequence = metadata.get(_SEQUENCE_KEY, b"-1")
    if not sequence.lstrip(b"-").isdigit():
        raise InvalidInput("trace batch: its sequence number is not a number", code="invalid_trace")
    return DecodedBatch(
        table=to_trace_schema(table, where="trace batch"),
        arrivals=None if arrivals is None else to_trace_schema(arrivals, where="trace batch"),
        source=source,
        sequence=int(sequence),
    )


def trace_table(known: dict[str, pa.Array]) -> pa.Table:
    """A table in TRACE_SCHEMA of equally long columns; the others are null."""
    rows = len(known["arrival_s"])
    columns = [known[field.name] if field.name in known else pa.nulls(rows, field.type) for field in TRACE_SCHEMA]
    return pa.table(columns, schema=TRACE_SCHEMA)


def to_trace_schema(table: pa.Table, *, where: str) -> pa.Table:
    """``table`` with exactly the columns of TRACE_SCHEMA; columns it lacks are null, those it has more are dropped.

    Raises InvalidInput, naming ``where``, on a newer schema version, a missing arrival or a column of another type.
    """
    version = (table.schema.metadata or {}).get(VERSION_KEY, str(SCHEMA_VERSION).encode())
    if not version.isdigit() or int(version) > SCHEMA_VERSION:
        raise InvalidInput(
            f"{where}: trace schema version {version.decode('utf-8', 'replace')}, this program reads {SCHEMA_VERSION}",
            code="invalid_trace",
        )
    if "arrival_s" not in table.column_names:
        raise InvalidInput(f"{where}: no column arrival_s or timestamp_s, so not a trace", code="invalid_trace")
    columns = []
    for field in TRACE_SCHEMA:
        if field.name not in table.column_names:
            columns.append(pa.chunked_array([pa.nulls(table.num_rows, field.type)]))
            continue
        column = table.column(field.name)
        try:
            columns.append(_cast(column, field.type))
        except pa.ArrowException as error:
            raise InvalidInput(
                f"{where}: column {field.name} is {column.type}, expected {field.type}", code="invalid_trace"
            ) from error
    if columns[0].null_count:
        raise InvalidInput(f"{where}: {columns[0].null_count} rows have no arrival time", code="invalid_trace")
    return pa.table(columns, schema=TRACE_SCHEMA)


def _cast(column: pa.ChunkedArray, wanted: pa.DataType) -> pa.ChunkedArray:
    if column.type == wanted:
        return column
    if pa.types.is_dictionary(wanted):
        return column.cast(wanted.value_type).dictionary_encode()
    return column.cast(wanted)
