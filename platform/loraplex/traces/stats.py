"""A trace in numbers: load, burstiness, skew, lengths, latencies. Called by ``loraplex trace stats``."""

import os
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from loraplex.traces.reader import read_traces
from loraplex.traces.schema import TRACE_SCHEMA

_COLUMNS = (
    "arrival_s",
    "tenant",
    "adapter_name",
    "prompt_tokens",
    "cached_tokens",
    "output_tokens",
    "ttft_s",
    "e2e_s",
    "tpot_s",
    "status",
)
_SUMMED = ("prompt_tokens", "output_tokens", "ttft_s", "e2e_s", "status")
_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Over the rows that have the value; ``count`` of them."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Skew:
    """How unevenly requests fall on tenants or adapters."""

    distinct: int
    top_share: float
    """Share of the requests that the busiest one has."""
    top_tenth_share: float
    """Share of the busiest tenth (at least one)."""
    gini: float
    """0: all equal; towards 1: one has everything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupStats:
    """One tenant or one (tenant, adapter)."""

    tenant: str | None
    adapter: str | None
    requests: int
    prompt_tokens: int
    output_tokens: int
    errors: int
    """Rows with a status of 400 or more."""
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    e2e_p50_s: float | None
    e2e_p99_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceStats:
    requests: int
    start_s: float
    """Arrival of the first request: Unix seconds in our traces, 0 in most public ones."""
    span_s: float
    """First to last arrival."""
    rate_per_s: float | None
    """None with fewer than two arrivals, or all at one time."""
    gap_cv: float | None
    """Standard deviation / mean of the gaps between arrivals; 1 for Poisson, more is burstier."""
    tenants: Skew
    adapters: Skew
    """Over (tenant, adapter) pairs; rows without an adapter are the plain base of their tenant."""
    prompt_tokens: Distribution | None
    cached_tokens: Distribution | None
    output_tokens: Distribution | None
    ttft_s: Distribution | None
    tpot_s: Distribution | None
    e2e_s: Distribution | None
    statuses: dict[str, int]
    by_tenant: tuple[GroupStats, ...]
    """Busiest first."""
    by_adapter: tuple[GroupStats, ...]


def trace_stats(path: str | os.PathLike[str]) -> TraceStats:
    """Statistics of the trace at ``path``. Errors as ``read_traces``."""
    return table_stats(read_traces(path, columns=_COLUMNS))


def table_stats(tables: Iterable[pa.Table]) -> TraceStats:
    """Statistics of tables in TRACE_SCHEMA; no rows at all give zeros and None."""
    parts = [TRACE_SCHEMA.empty_table(), *tables]
    table = pa.concat_tables([part.select(_COLUMNS) for part in parts]).unify_dictionaries()
    arrivals_s = np.sort(table.column("arrival_s").to_numpy())
    span_s = float(arrivals_s[-1] - arrivals_s[0]) if len(arrivals_s) else 0.0
    by_tenant = _groups(table, ("tenant",))
    by_adapter = _groups(table, ("tenant", "adapter_name"))
    return TraceStats(
        requests=len(arrivals_s),
        start_s=float(arrivals_s[0]) if len(arrivals_s) else 0.0,
        span_s=span_s,
        rate_per_s=(len(arrivals_s) - 1) / span_s if span_s > 0 else None,
        gap_cv=_gap_cv(arrivals_s),
        tenants=_skew(by_tenant),
        adapters=_skew(by_adapter),
        prompt_tokens=_distribution(table, "prompt_tokens"),
        cached_tokens=_distribution(table, "cached_tokens"),
        output_tokens=_distribution(table, "output_tokens"),
        ttft_s=_distribution(table, "ttft_s"),
        tpot_s=_distribution(table, "tpot_s"),
        e2e_s=_distribution(table, "e2e_s"),
        statuses=_statuses(table),
        by_tenant=by_tenant,
        by_adapter=by_adapter,
    )


def _values(table: pa.Table, name: str) -> _Floats:
    values: _Floats = table.column(name).drop_null().cast(pa.float64()).to_numpy()
    return values


def _distribution(table: pa.Table, name: str) -> Distribution | None:
    values = _values(table, name)
    if not len(values):
        return None
    p50, p90, p99 = (float(value) for value in np.percentile(values, (50, 90, 99)))
    return Distribution(
        count=len(values), mean=float(values.mean()), p50=p50, p90=p90, p99=p99, max=float(values.max())
    )


def _gap_cv(arrivals_s: _Floats) -> float | None:
    gaps_s = np.diff(arrivals_s)
    if len(gaps_s) < 2 or gaps_s.mean() <= 0:
        return None
    return float(gaps_s.std() / gaps_s.mean())


def _statuses(table: pa.Table) -> dict[str, int]:
    counts = pc.value_counts(table.column("status").drop_null().cast(pa.int32()))
    return {str(entry["values"]): entry["counts"] for entry in sorted(counts.to_pylist(), key=lambda e: e["values"])}


def _skew(groups: tuple[GroupStats, ...]) -> Skew:
    counts = np.array([group.requests for group in groups], dtype=np.float64)
    total = counts.sum()
    if not total:
        return Skew(distinct=0, top_share=0.0, top_tenth_share=0.0, gini=0.0)
    num = len(counts)
    ascending = counts[::-1]
    gini = float((2 * np.arange(1, num + 1) - num - 1) @ ascending / (num * total))
    return Skew(
        distinct=num,
        top_share=float(counts[0] / total),
        top_tenth_share=float(counts[: max(1, num // 10)].sum() / total),
        gini=gini,
    )


def _groups(table: pa.Table, keys: tuple[str, ...]) -> tuple[GroupStats, ...]:
    """One entry per distinct value of ``keys``, busiest first, ties by name."""
    if not table.num_rows:
        return ()
    names: list[list[str | None]] = []
    codes = np.zeros(table.num_rows, dtype=np.int64)
    for key in keys:
        strings = table.column(key).cast(pa.string()).combine_chunks()
        encoded = pc.dictionary_encode(strings, null_encoding="encode")
        names.append(encoded.dictionary.to_pylist())
        codes = codes * len(names[-1]) + encoded.indices.to_numpy()
    order = np.argsort(codes, kind="stable")
    starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
    columns = {name: _column(table, name)[order] for name in _SUMMED}
    result = []
    for start, end in zip(starts, [*starts[1:], len(order)], strict=True):
        code = int(codes[order[start]])
        labels: list[str | None] = []
        for values in reversed(names):
            code, index = divmod(code, len(values))
            labels.insert(0, values[index])
        ttft_s, e2e_s = columns["ttft_s"][start:end], columns["e2e_s"][start:end]
        result.append(
            GroupStats(
                tenant=labels[0],
                adapter=labels[1] if len(labels) > 1 else None,
                requests=int(end - start),
                prompt_tokens=int(np.nansum(columns["prompt_tokens"][start:end])),
                output_tokens=int(np.nansum(columns["output_tokens"][start:end])),
                errors=int((columns["status"][start:end] >= 400).sum()),
                ttft_p50_s=_percentile(ttft_s, 50),
                ttft_p99_s=_percentile(ttft_s, 99),
                e2e_p50_s=_percentile(e2e_s, 50),
                e2e_p99_s=_percentile(e2e_s, 99),
            )
        )
    return tuple(sorted(result, key=lambda group: (-group.requests, group.tenant or "", group.adapter or "")))


def _column(table: pa.Table, name: str) -> _Floats:
    """The column as float64 with nan for null."""
    values: _Floats = table.column(name).cast(pa.float64()).to_numpy(zero_copy_only=False)
    return values


def _percentile(values: _Floats, percent: float) -> float | None:
    known = values[~np.isnan(values)]
    return float(np.percentile(known, percent)) if len(known) else None
