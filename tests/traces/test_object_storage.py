"""Traces on S3: written, merged, kept within their size, read back; the store goes away and comes back."""

import time
from collections.abc import Callable

import pytest
from loraplex.core.errors import NotFound, Unavailable
from loraplex.object_storage.retry import Retry
from loraplex.traces import parquet, reader
from loraplex.traces.config import TraceConfig
from loraplex.traces.reader import read_traces
from loraplex.traces.rotation import merge_parts
from loraplex.traces.row import TraceRow
from loraplex.traces.schema import encode_batch
from loraplex.traces.sink import TraceSink
from loraplex.traces.storage import TraceFolder
from loraplex.traces.writer import TraceWriter

from tests.object_storage.s3 import SECRET_KEY, S3Server

Make = Callable[..., TraceRow]


def _batch(make_row: Make, first: int, count: int) -> bytes:
    rows = [make_row(index) for index in range(first, first + count)]
    return encode_batch(rows, source="gateway", sequence=first)


def _ids(url: str) -> list[str]:
    return [name for table in read_traces(url) for name in table.column("request_id").to_pylist()]


def _wait(check: Callable[[], bool], *, timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_write_merge_and_read(s3: S3Server, make_row: Make) -> None:
    url = s3.url("traces/merge")
    writer = TraceWriter(TraceConfig(write_interval_s=0.02), url)
    for number in range(4):
        writer.append(_batch(make_row, number * 10, 10))
        _wait(lambda wanted=(number + 1) * 10: writer.status().written_rows == wanted)  # type: ignore[misc]
    assert len(s3.names("traces/merge")) == 4
    assert _ids(url) == [f"request-{index:06d}" for index in range(40)], "beside the writer"
    writer.close()
    (name,) = s3.names("traces/merge")
    assert name.startswith("traces/merge/trace-")
    assert _ids(url) == [f"request-{index:06d}" for index in range(40)]
    assert SECRET_KEY not in writer.status().url


def test_a_trace_file_of_ones_own_name(s3: S3Server, make_row: Make) -> None:
    url = s3.url("traces/one.parquet")
    rows = next(iter(read_traces(_written(s3, make_row))))
    with TraceSink(url) as sink:
        sink.write(rows)
    assert _ids(url) == [f"request-{index:06d}" for index in range(5)]
    with pytest.raises(NotFound):
        _ids(s3.url("traces/none.parquet"))


def _written(s3: S3Server, make_row: Make) -> str:
    url = s3.url("traces/some")
    writer = TraceWriter(TraceConfig(), url)
    writer.append(_batch(make_row, 0, 5))
    writer.close()
    return url


def test_rows_wait_for_a_store_that_is_away(
    s3: S3Server, make_row: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = s3.url("traces/away")
    writer = TraceWriter(TraceConfig(write_interval_s=0.05), url)
    writer.append(_batch(make_row, 0, 10))
    _wait(lambda: writer.status().written_rows == 10)
    s3.gate.shut()
    try:
        writer.append(_batch(make_row, 10, 10))
        _wait(lambda: writer.status().last_error is not None)
        writer.append(_batch(make_row, 20, 10))
        status = writer.status()
        assert (status.written_rows, status.dropped_rows) == (10, 0)
        monkeypatch.setattr(reader, "RETRY", Retry(total_s=0.3))
        with pytest.raises(Unavailable, match="does not answer"):
            _ids(url)
    finally:
        s3.gate.open()
    _wait(lambda: writer.status().written_rows == 30)
    writer.close()
    assert _ids(url) == [f"request-{index:06d}" for index in range(30)], "in order, none twice"
    assert SECRET_KEY not in caplog.text + str(writer.status())


def test_parts_that_cannot_be_reached_are_not_taken_for_damaged(
    s3: S3Server, make_row: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store goes away before the parts are merged."""
    monkeypatch.setattr(parquet, "RETRY", Retry(total_s=0.2))
    url = s3.url("traces/unmerged")
    writer = TraceWriter(TraceConfig(write_interval_s=0.02), url)
    writer.append(_batch(make_row, 0, 10))
    _wait(lambda: writer.status().written_rows == 10)
    folder = TraceFolder.open(url)
    parts = folder.files()
    s3.gate.shut()
    try:
        with pytest.raises(Unavailable):
            merge_parts(folder, parts)
        writer.close()
    finally:
        s3.gate.open()
    (name,) = s3.names("traces/unmerged")
    assert name.startswith("traces/unmerged/part-")
    assert len(_ids(url)) == 10
