"""Statistics against numbers worked out by hand and against the library."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loraplex.traces.row import TraceRow
from loraplex.traces.schema import TRACE_SCHEMA, rows_to_batch
from loraplex.traces.stats import table_stats, trace_stats

DATA = Path(__file__).parent / "data"


def _table(rows: list[TraceRow]) -> pa.Table:
    return pa.Table.from_batches([rows_to_batch(rows)])


def test_by_hand(make_row: Callable[..., TraceRow]) -> None:
    rows = [
        make_row(
            arrival_s=100.0, tenant="a", adapter_name="x", prompt_tokens=10, output_tokens=1, ttft_s=0.1, e2e_s=1.0
        ),
        make_row(
            arrival_s=101.0, tenant="a", adapter_name="x", prompt_tokens=20, output_tokens=2, ttft_s=0.3, e2e_s=2.0
        ),
        make_row(
            arrival_s=103.0, tenant="a", adapter_name=None, prompt_tokens=30, output_tokens=3, status=429, ttft_s=None
        ),
        make_row(
            arrival_s=104.0, tenant="b", adapter_name="x", prompt_tokens=40, output_tokens=4, ttft_s=0.5, e2e_s=4.0
        ),
    ]
    stats = table_stats([_table(rows[2:]), _table(rows[:2])])
    assert (stats.requests, stats.start_s, stats.span_s, stats.rate_per_s) == (4, 100.0, 4.0, 0.75)
    gaps = np.array([1.0, 2.0, 1.0])
    assert stats.gap_cv == pytest.approx(gaps.std() / gaps.mean())
    assert stats.tenants.distinct == 2
    assert stats.tenants.top_share == 0.75
    assert stats.tenants.gini == pytest.approx(0.25)
    assert stats.adapters.distinct == 3
    assert stats.statuses == {"200": 3, "429": 1}
    assert stats.prompt_tokens is not None
    assert (stats.prompt_tokens.mean, stats.prompt_tokens.p50, stats.prompt_tokens.max) == (25.0, 25.0, 40.0)
    assert stats.ttft_s is not None
    assert stats.ttft_s.count == 3
    assert stats.ttft_s.p50 == pytest.approx(0.3)
    busiest = stats.by_tenant[0]
    assert (busiest.tenant, busiest.requests, busiest.errors, busiest.output_tokens) == ("a", 3, 1, 6)
    assert [(g.tenant, g.adapter, g.requests) for g in stats.by_adapter] == [
        ("a", "x", 2),
        ("a", None, 1),
        ("b", "x", 1),
    ]


def test_no_rows_and_one_row(make_row: Callable[..., TraceRow]) -> None:
    empty = table_stats([TRACE_SCHEMA.empty_table()])
    assert (empty.requests, empty.rate_per_s, empty.e2e_s, empty.by_tenant) == (0, None, None, ())
    one = table_stats([_table([make_row()])])
    assert (one.requests, one.span_s, one.rate_per_s, one.gap_cv) == (1, 0.0, None, None)


def test_public_trace() -> None:
    stats = trace_stats(DATA / "lmsys_arena_200.parquet")
    raw = pq.read_table(DATA / "lmsys_arena_200.parquet")
    assert stats.requests == 200
    assert stats.prompt_tokens is not None
    assert stats.prompt_tokens.p90 == pytest.approx(np.percentile(raw.column("prompt_tokens").to_numpy(), 90))
    counts = raw.column("tenant").value_counts().to_pylist()
    assert stats.by_tenant[0].requests == max(entry["counts"] for entry in counts)
    assert stats.e2e_s is None
    assert stats.statuses == {}


def test_poisson_has_a_cv_of_one(make_row: Callable[..., TraceRow]) -> None:
    times = np.cumsum(np.random.default_rng(0).exponential(1.0, 5000))
    stats = table_stats([_table([make_row(arrival_s=float(at)) for at in times])])
    assert stats.gap_cv == pytest.approx(1.0, abs=0.05)
