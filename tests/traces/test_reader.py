"""Reading: our files beside a running writer, public files, and one clear error for what is broken."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loraplex.core.errors import InvalidInput, NotFound
from loraplex.traces.arrivals import load_requests
from loraplex.traces.config import TraceConfig
from loraplex.traces.reader import read_traces
from loraplex.traces.row import TraceRow
from loraplex.traces.schema import TRACE_SCHEMA, encode_batch
from loraplex.traces.writer import TraceWriter

DATA = Path(__file__).parent / "data"


def test_public_file_in_our_columns() -> None:
    tables = list(read_traces(DATA / "lmsys_arena_200.parquet", batch_rows=64))
    assert [table.num_rows for table in tables] == [64, 64, 64, 8]
    assert all(table.schema == TRACE_SCHEMA for table in tables)
    assert tables[0].slice(0, 1).to_pylist()[0]["adapter_name"] == "arena-model-13"
    assert tables[0].column("status").null_count == 64


def test_folder_and_glob_and_columns() -> None:
    assert sum(table.num_rows for table in read_traces(DATA)) == 500
    assert sum(table.num_rows for table in read_traces(str(DATA / "lmsys*.parquet"))) == 200
    table = next(read_traces(DATA / "lmsys_arena_200.parquet", columns=["tenant"]))
    assert table.column("prompt_tokens").null_count == 200
    assert table.column("tenant").null_count == 0


def test_requests_are_sorted_and_start_at_zero(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"timestamp_s": [9.0, 5.0, 7.0], "tenant": ["c", "a", "b"], "prompt_tokens": [3, 1, 2]}),
        tmp_path / "x.parquet",
    )
    requests = load_requests(tmp_path / "x.parquet")
    assert [(r.arrival_s, r.tenant, r.adapter, r.prompt_tokens) for r in requests] == [
        (0.0, "a", None, 1),
        (2.0, "b", None, 2),
        (4.0, "c", None, 3),
    ]
    assert len(load_requests(tmp_path / "x.parquet", duration_s=3.0)) == 2
    assert len(load_requests(tmp_path / "x.parquet", limit=1)) == 1


def test_missing_tokens_stay_missing() -> None:
    requests = load_requests(DATA / "servegen_m_large_300.parquet")
    missing = [request for request in requests if request.prompt_tokens is None]
    assert len(missing) > 50
    assert all(request.output_tokens is None for request in missing)


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "middle", "other"])
def test_a_bad_file_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "bad.parquet"
    data = (DATA / "servegen_m_large_300.parquet").read_bytes()
    if damage == "other":
        pq.write_table(pa.table({"function": ["f"], "count": [1]}), path)
    else:
        path.write_bytes(
            {
                "empty": b"",
                "text": b"timestamp_s,tenant\n0,a\n",
                "truncated": data[: len(data) // 2],
                "middle": data[:100] + b"\xff" * 400 + data[500:],
            }[damage]
        )
    with pytest.raises(InvalidInput, match=r"bad\.parquet") as caught:
        list(read_traces(tmp_path))
    assert "\n" not in caught.value.message


def test_nothing_there_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path, tmp_path / "*.parquet"):
        with pytest.raises(NotFound, match=str(tmp_path)):
            list(read_traces(path))
    pq.write_table(TRACE_SCHEMA.empty_table(), tmp_path / "empty.parquet")
    assert sum(table.num_rows for table in read_traces(tmp_path)) == 0
    with pytest.raises(NotFound, match="no rows"):
        load_requests(tmp_path)


def test_reading_beside_a_writer_sees_each_row_once(tmp_path: Path, make_row: Callable[..., TraceRow]) -> None:
    """The writer flushes and merges all the time; every read is a prefix of what was appended."""
    writer = TraceWriter(TraceConfig(write_interval_s=0.01, rotate_age_s=0.05, adopt_age_s=100.0), str(tmp_path))
    writer.start()
    stop = threading.Event()

    def append() -> None:
        for i in range(10_000):
            if stop.is_set():
                return
            writer.append(encode_batch([make_row(i)], source="g", sequence=i))
            time.sleep(0.002)

    thread = threading.Thread(target=append)
    thread.start()
    try:
        deadline = time.monotonic() + 3
        seen = 0
        while time.monotonic() < deadline:
            if not any(name.endswith(".parquet") and name[0] != "." for name in os.listdir(tmp_path)):
                continue
            ids = [name for table in read_traces(tmp_path) for name in table.column("request_id").to_pylist()]
            assert ids == [f"request-{i:06d}" for i in range(len(ids))]
            assert len(ids) >= seen
            seen = len(ids)
        assert seen > 50
    finally:
        stop.set()
        thread.join()
        writer.close()
