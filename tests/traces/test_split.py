"""Splitting: every row lands in exactly one file, with its columns and the right clock."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loraplex.core.errors import BadConfig, InvalidInput, NotFound
from loraplex.traces import split
from loraplex.traces.arrivals import read_arrivals
from loraplex.traces.row import TraceRow
from loraplex.traces.schema import rows_to_batch
from loraplex.traces.split import split_tenants, split_train_test, split_windows

ARENA = Path(__file__).parent / "data" / "lmsys_arena_200.parquet"


def test_windows(tmp_path: Path) -> None:
    made = split_windows(str(ARENA), tmp_path, every_s=20.0)
    assert sum(file.rows for file in made) == 200
    parts = [read_arrivals(file.path) for file in made]
    joined = np.concatenate([part.arrival_s + file.start_s for part, file in zip(parts, made, strict=True)])
    assert np.allclose(joined, read_arrivals(ARENA).arrival_s, atol=1e-9)
    assert all(part.arrival_s.max() < 20 for part in parts)
    assert [Path(file.path).name for file in made[:2]] == ["window-0000.parquet", "window-0001.parquet"]


def test_recorded_rows_keep_their_columns(tmp_path: Path, make_row: Callable[..., TraceRow]) -> None:
    rows = [make_row(i, arrival_s=1.7e9 + i) for i in (1, 0, 3, 2, 5, 4)]
    pq.write_table(pa.Table.from_batches([rows_to_batch(rows)]), tmp_path / "x.parquet")
    made = split_windows(str(tmp_path / "x.parquet"), tmp_path, every_s=4.0)
    assert [file.rows for file in made] == [4, 2]
    second = pq.read_table(made[1].path).to_pylist()
    assert [row["request_id"] for row in second] == ["request-000004", "request-000005"]
    assert [row["arrival_s"] for row in second] == [0.0, 1.0]
    assert second[0]["e2e_s"] == 2.0


def test_train_and_test(tmp_path: Path) -> None:
    train, test = split_train_test(str(ARENA), tmp_path, train=0.7)
    whole = read_arrivals(ARENA)
    assert train.rows + test.rows == 200
    cut_s = whole.arrival_s[0] + 0.7 * (whole.arrival_s[-1] - whole.arrival_s[0])
    assert train.rows == (whole.arrival_s < cut_s).sum()
    assert np.allclose(read_arrivals(test.path).arrival_s + test.start_s, whole.arrival_s[train.rows :])
    for share in (0.0, 1.0, 2.0, float("nan")):
        with pytest.raises(BadConfig, match="train"):
            split_train_test(str(ARENA), tmp_path, train=share)


def test_tenants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "_MAX_HELD_ROWS", 10)
    columns = {"timestamp_s": [0.0, 1.0, 2.0, 3.0], "tenant": ["a/b", "..", "a/b", None]}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet", row_group_size=1)
    made = split_tenants(str(tmp_path / "x.parquet"), tmp_path / ".")
    assert [(Path(file.path).name, file.rows) for file in made] == [
        ("tenant-a%2Fb.parquet", 2),
        ("tenant-...parquet", 1),
    ]
    assert read_arrivals(made[0].path).arrival_s.tolist() == [0.0, 2.0]
    assert [file.rows for file in split_tenants(str(tmp_path / "x.parquet"), tmp_path, only=[".."])] == [1]
    with pytest.raises(NotFound, match="tenant 'nosuch'"):
        split_tenants(str(tmp_path / "x.parquet"), tmp_path, only=["nosuch"])
    monkeypatch.setattr(split, "MAX_TENANT_FILES", 1)
    with pytest.raises(InvalidInput, match="over 1 tenants"):
        split_tenants(str(tmp_path / "x.parquet"), tmp_path)


def test_nothing_to_split(tmp_path: Path) -> None:
    pq.write_table(pa.table({"timestamp_s": pa.array([], pa.float64())}), tmp_path / "x.parquet")
    for run in (
        lambda: split_windows(str(tmp_path / "x.parquet"), tmp_path, every_s=1.0),
        lambda: split_train_test(str(tmp_path / "x.parquet"), tmp_path, train=0.5),
        lambda: split_tenants(str(tmp_path / "x.parquet"), tmp_path),
    ):
        with pytest.raises(NotFound, match=r"x\.parquet has no rows"):
            run()
    with pytest.raises(BadConfig, match="window"):
        split_windows(str(ARENA), tmp_path, every_s=0.0)
