"""Trace files appear whole or not at all, and equal rows give equal bytes."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loraplex.core.errors import NotFound
from loraplex.traces.schema import TRACE_SCHEMA
from loraplex.traces.sink import ROW_GROUP_ROWS, TraceSink
from loraplex.traces.synth.generate import generate
from loraplex.traces.synth.recipe import Recipe


def test_bytes_do_not_depend_on_the_cut(tmp_path: Path) -> None:
    table = pa.concat_tables(generate(Recipe(adapters=50, requests=150_000, rate=1000)))
    for name, step in (("a", 150_000), ("b", 7_000)):
        with TraceSink(tmp_path / name) as sink:
            for start in range(0, table.num_rows, step):
                sink.write(table.slice(start, step))
                assert sink.pending_rows < ROW_GROUP_ROWS
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    written = pq.read_table(tmp_path / "a")
    assert written.schema == TRACE_SCHEMA
    assert written.column("adapter_name").to_pylist() == table.column("adapter_name").to_pylist()
    assert pq.ParquetFile(tmp_path / "a").num_row_groups == 3


def test_no_file_after_an_error(tmp_path: Path) -> None:
    def fail() -> None:
        with TraceSink(tmp_path / "x.parquet") as sink:
            for table in generate(Recipe(requests=100)):
                sink.write(table)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    for count in (10, 20):
        with TraceSink(path) as sink:
            for table in generate(Recipe(requests=count)):
                sink.write(table)
            assert not path.exists() or pq.read_table(path).num_rows == 10
    assert pq.read_table(path).num_rows == 20
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.parquet"]


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="nosuch"):
        TraceSink(tmp_path / "nosuch" / "x.parquet")


def test_a_url(tmp_path: Path) -> None:
    with TraceSink(f"file://{tmp_path}/x.parquet") as sink:
        sink.write(TRACE_SCHEMA.empty_table())
    assert pq.read_table(tmp_path / "x.parquet").num_rows == 0
