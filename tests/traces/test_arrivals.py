"""Arrivals as arrays: the same whole and in chunks, in order, with stable indices; and what is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loraplex.core.errors import BadConfig, InvalidInput, NotFound
from loraplex.traces import order
from loraplex.traces.arrivals import AdapterName, Window, iter_arrivals, read_arrivals
from loraplex.traces.row import TraceRow
from loraplex.traces.schema import TRACE_SCHEMA, rows_to_batch
from loraplex.traces.sink import TraceSink
from loraplex.traces.synth.generate import generate
from loraplex.traces.synth.recipe import Recipe

DATA = Path(__file__).parent / "data"


def _public(path: Path, **columns: list[object]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_columns_and_names(tmp_path: Path) -> None:
    path = _public(
        tmp_path / "x.parquet",
        timestamp_s=[0.5, 1.5, 2.5, 3.5],
        tenant=["b", "a", "b", None],
        adapter=["x", "x", None, "y"],
        base_model_id=["m", None, "m", None],
        prompt_tokens=[3, None, 5, 6],
    )
    arrivals = read_arrivals(path)
    assert arrivals.arrival_s.tolist() == [0.5, 1.5, 2.5, 3.5]
    assert arrivals.tenants == ("b", "a")
    assert arrivals.tenant.tolist() == [0, 1, 0, -1]
    assert arrivals.base_models == ("m",)
    assert arrivals.base_model.tolist() == [0, -1, 0, -1]
    assert arrivals.adapters == (
        AdapterName("b", "m", "x"),
        AdapterName("a", None, "x"),
        AdapterName(None, None, "y"),
    )
    assert arrivals.adapter.tolist() == [0, 1, -1, 2]
    assert arrivals.prompt_tokens.tolist() == [3, -1, 5, 6]
    assert arrivals.output_tokens.tolist() == [-1] * 4
    assert {column.dtype for column in (arrivals.adapter, arrivals.tenant, arrivals.prompt_tokens)} == {np.dtype("i4")}


def test_chunks_add_up_to_the_whole(tmp_path: Path) -> None:
    with TraceSink(tmp_path / "x.parquet") as sink:
        for table in generate(Recipe(adapters=300, tenants=7, rate=500, requests=200_000, skew=1.0)):
            sink.write(table)
    whole = read_arrivals(tmp_path / "x.parquet")
    chunks = list(iter_arrivals(tmp_path / "x.parquet"))
    assert len(chunks) > 2
    assert np.array_equal(np.concatenate([chunk.arrival_s for chunk in chunks]), whole.arrival_s)
    for chunk in chunks:
        assert chunk.adapters == whole.adapters[: len(chunk.adapters)]
        assert chunk.adapter.max() < len(chunk.adapters)
    names = [chunk.adapters[index].name for chunk in chunks for index in chunk.adapter]
    rows = pq.read_table(tmp_path / "x.parquet").column("adapter_name").to_pylist()
    assert names == rows


def test_a_window_starts_at_zero() -> None:
    path = DATA / "lmsys_arena_200.parquet"
    whole = read_arrivals(path)
    part = read_arrivals(path, Window(20.0, 50.0))
    inside = (whole.arrival_s >= 20) & (whole.arrival_s < 50)
    assert len(part) == inside.sum() > 10
    assert np.array_equal(part.arrival_s, whole.arrival_s[inside] - 20.0)
    assert part.origin_s == 20.0
    assert [part.tenants[i] for i in part.tenant] == [whole.tenants[i] for i in whole.tenant[inside]]
    with pytest.raises(NotFound, match="no rows from 1000000"):
        read_arrivals(path, Window(1e6, 2e6))
    with pytest.raises(BadConfig, match="empty"):
        read_arrivals(path, Window(5.0, 5.0))


def test_recorded_rows_come_in_order_of_their_end(
    tmp_path: Path, make_row: Callable[..., TraceRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order, "MAX_HELD_ROWS", 64)
    rng = np.random.default_rng(0)
    started = np.cumsum(rng.exponential(1.0, 1000)) + 1.7e9
    lasted = rng.exponential(5.0, 1000)
    rows = [make_row(i, arrival_s=float(started[i]), e2e_s=float(lasted[i])) for i in np.argsort(started + lasted)]
    pq.write_table(pa.Table.from_batches([rows_to_batch(rows)]), tmp_path / "x.parquet", row_group_size=50)
    arrivals = read_arrivals(tmp_path / "x.parquet")
    assert np.array_equal(arrivals.origin_s + arrivals.arrival_s, started)
    assert arrivals.prompt_tokens.tolist() == [10 + i for i in range(1000)]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"timestamp_s": [0.0, 2.0, 1.0]}, "row 2 arrives at 1.0 s, after one at 2.0 s"),
        ({"timestamp_s": [0.0, float("nan")]}, "row 1 has arrival time nan"),
        ({"timestamp_s": [0.0, 1.0, -1.0]}, "row 2 has arrival time -1.0"),
        ({"timestamp_s": [0.0, float("inf")]}, "row 1 has arrival time inf"),
        ({"timestamp_s": [0.0, 1.0], "prompt_tokens": [1, -5]}, "row 1 has prompt_tokens -5"),
        ({"timestamp_s": [0.0, 1.0], "output_tokens": [None, -1]}, "row 1 has output_tokens -1"),
    ],
)
def test_what_cannot_be_is_named(tmp_path: Path, columns: dict[str, list[object]], words: str) -> None:
    path = _public(tmp_path / "x.parquet", **columns)
    with pytest.raises(InvalidInput, match=words) as caught:
        read_arrivals(path)
    assert "x.parquet" in caught.value.message
    assert "\n" not in caught.value.message


def test_rows_out_of_order_across_batches_are_named(tmp_path: Path) -> None:
    times = [float(i) for i in range(70_000)]
    times[69_000] = 3.0
    path = _public(tmp_path / "x.parquet", timestamp_s=times)
    with pytest.raises(InvalidInput, match=r"row 69000 arrives at 3\.0 s, after one at 68999\.0 s"):
        read_arrivals(path)
    assert np.array_equal(read_arrivals(path, sort=True).arrival_s, np.sort(times))


def test_no_rows(tmp_path: Path) -> None:
    pq.write_table(TRACE_SCHEMA.empty_table(), tmp_path / "x.parquet")
    with pytest.raises(NotFound, match="no rows"):
        read_arrivals(tmp_path / "x.parquet")
    assert list(iter_arrivals(tmp_path / "x.parquet")) == []
