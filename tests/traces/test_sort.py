"""The external sort: like a stable sort in memory, whatever the sizes of runs and tables."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex.traces import sort
from loraplex.traces.schema import trace_table
from loraplex.traces.sort import sort_by_arrival


def _table(times: list[float], first: int) -> pa.Table:
    ids = pa.array([f"r{first + i}" for i in range(len(times))])
    tenants = pa.array([f"t{(first + i) % 3}" for i in range(len(times))]).dictionary_encode()
    return trace_table({"arrival_s": pa.array(times, pa.float64()), "request_id": ids, "tenant": tenants})


@settings(max_examples=60, deadline=None)
@given(
    tables=st.lists(st.lists(st.integers(0, 8).map(float), max_size=12), max_size=8),
    run_rows=st.integers(1, 20),
    block_rows=st.integers(1, 5),
)
def test_like_a_stable_sort(tables: list[list[float]], run_rows: int, block_rows: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sort, "_BLOCK_ROWS", block_rows)
        made, total = [], 0
        for times in tables:
            made.append(_table(times, total))
            total += len(times)
        result = list(sort_by_arrival(iter(made), run_rows=run_rows))
    times = [at for table in tables for at in table]
    order = np.argsort(times, kind="stable") if times else []
    assert [row["request_id"] for table in result for row in table.to_pylist()] == [f"r{i}" for i in order]
    assert [row["tenant"] for table in result for row in table.to_pylist()] == [f"t{i % 3}" for i in order]


def test_an_error_in_the_source_comes_through() -> None:
    def broken() -> object:
        yield _table([1.0, 0.0], 0)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        list(sort_by_arrival(broken(), run_rows=1))  # type: ignore[arg-type]
