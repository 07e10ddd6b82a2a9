"""The trace schema: what goes in comes out, and what is not a trace is named."""

import math
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex.core.errors import InvalidInput
from loraplex.traces.row import ArrivalRow, TraceRow
from loraplex.traces.schema import (
    SCHEMA_VERSION,
    TRACE_SCHEMA,
    VERSION_KEY,
    decode_batch,
    encode_batch,
    rows_to_batch,
    to_trace_schema,
)

_text = st.text(max_size=20).filter(lambda text: "\ud800" not in text)
_seconds = st.floats(0, 1e6)
_arrived: dict[str, st.SearchStrategy[Any]] = {
    "arrival_s": st.floats(0, 4e9),
    "tenant": _text,
    "request_id": _text,
    "base_model_id": _text,
    "adapter_name": st.none() | _text,
    "prompt_tokens": st.integers(0, 2**31 - 1),
}
_arrivals = st.builds(ArrivalRow, **_arrived)
_rows = st.builds(
    TraceRow,
    **_arrived,
    endpoint=_text,
    adapter_version=st.none() | st.integers(1, 2**31 - 1),
    adapter_digest=st.none() | _text,
    cached_tokens=st.integers(0, 2**31 - 1),
    output_tokens=st.integers(0, 2**31 - 1),
    ttft_s=st.none() | _seconds,
    e2e_s=_seconds,
    tpot_s=st.none() | _seconds,
    status=st.integers(100, 599),
    finish_reason=st.none() | _text,
    replica_id=st.none() | _text,
    priority=st.sampled_from(["online", "offline"]),
    stream=st.booleans(),
)


@given(st.lists(_rows, max_size=8), st.lists(_arrivals, max_size=8))
def test_rows_survive_the_wire(rows: list[TraceRow], arrivals: list[ArrivalRow]) -> None:
    batch = encode_batch(rows, arrivals=arrivals, source="gateway-1", sequence=7)
    decoded = decode_batch(batch)
    assert decoded.source == "gateway-1"
    assert decoded.sequence == 7
    assert [TraceRow(**entry) for entry in decoded.table.to_pylist()] == rows
    assert decoded.arrivals is not None
    assert decoded.arrivals.schema == TRACE_SCHEMA
    told = decoded.arrivals.select(list(ArrivalRow.__dataclass_fields__)).to_pylist()
    assert [ArrivalRow(**entry) for entry in told] == arrivals
    before_arrivals = to_trace_schema(pa.ipc.open_stream(batch).read_all(), where="as an older release reads it")
    assert before_arrivals.equals(decoded.table)


def test_a_value_that_does_not_fit_is_refused(make_row: Callable[..., TraceRow]) -> None:
    with pytest.raises(InvalidInput, match="does not fit"):
        rows_to_batch([make_row(prompt_tokens=2**40)])


def test_other_bytes_are_refused() -> None:
    for data in (b"", b"\x00" * 64, b"PAR1 no"):
        with pytest.raises(InvalidInput, match="Arrow IPC"):
            decode_batch(data)


def test_truncated_batch_is_refused(make_row: Callable[..., TraceRow]) -> None:
    data = encode_batch([make_row(i) for i in range(10)], source="g", sequence=0)
    for cut in range(8, len(data) - 8, 97):
        with pytest.raises(InvalidInput):
            decode_batch(data[:cut])


def test_newer_schema_is_named() -> None:
    table = TRACE_SCHEMA.empty_table().replace_schema_metadata({VERSION_KEY: str(SCHEMA_VERSION + 1)})
    with pytest.raises(InvalidInput, match=r"file\.parquet: trace schema version 2"):
        to_trace_schema(table, where="file.parquet")


def test_missing_columns_are_null_and_types_are_widened() -> None:
    table = pa.table(
        {
            "arrival_s": pa.array([1, 2], pa.int64()),
            "tenant": pa.array(["a", "b"], pa.dictionary(pa.int8(), pa.string())),
            "extra": pa.array([1, 2]),
        }
    )
    converted = to_trace_schema(table, where="x")
    assert converted.schema == TRACE_SCHEMA
    assert converted.column("arrival_s").to_pylist() == [1.0, 2.0]
    assert converted.column("tenant").to_pylist() == ["a", "b"]
    assert converted.column("status").null_count == 2


def test_no_arrival_column_or_value_is_an_error() -> None:
    with pytest.raises(InvalidInput, match="no column arrival_s"):
        to_trace_schema(pa.table({"tenant": ["a"]}), where="x")
    with pytest.raises(InvalidInput, match="1 rows have no arrival"):
        to_trace_schema(pa.table({"arrival_s": pa.array([None, 1.0])}), where="x")


def test_nan_is_kept(make_row: Callable[..., TraceRow]) -> None:
    decoded = decode_batch(encode_batch([make_row(ttft_s=math.nan)], source="g", sequence=0))
    assert math.isnan(decoded.table.column("ttft_s")[0].as_py())
