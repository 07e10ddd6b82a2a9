"""A trace in numbers: load, burstiness, skew, lengths, latencies, in one pass. Called by ``loraplex trace stats``.

Memory follows the number of tenants and adapters, not of rows.
"""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from loraplex.traces.names import NameTable, column_indices, pair_indices
from loraplex.traces.order import in_arrival_order
from loraplex.traces.quantiles import GroupedSketch, QuantileSketch
from loraplex.traces.reader import read_traces
from loraplex.traces.tally import GroupTally, zipf_exponent

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
_DISTRIBUTIONS = ("prompt_tokens", "cached_tokens", "output_tokens", "ttft_s", "tpot_s", "e2e_s")
_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Over the rows that have the value; ``count`` of them. Quantiles of over 65,536 values are within 0.5 %."""

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
    zipf: float | None
    """Exponent of the power law over ranks that fits best; None with fewer than two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupStats:
    """One tenant or one (tenant, adapter)."""

    tenant: str | None
    adapter: str | None
    requests: int
    rate_per_s: float | None
    """Over the whole trace; None where the trace has no length."""
    gap_cv: float | None
    """As that of the trace, between the arrivals of this one alone; None with fewer than three."""
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
    """Statistics of the trace at ``path``. Errors as ``read_traces``; InvalidInput names a row that is out of order."""
    return table_stats(read_traces(path, columns=_COLUMNS), where=f"trace {os.fspath(path)}")


def table_stats(tables: Iterable[pa.Table], *, where: str = "trace") -> TraceStats:
    """Statistics of tables in TRACE_SCHEMA; no rows at all give zeros and None."""
    summary = _Summary()
    for table in in_arrival_order(tables, where=where):
        summary.add(table)
    return summary.result()


class _Summary:
    """Everything that is added up over the chunks."""

    def __init__(self) -> None:
        self._first_s: float | None = None
        self._last_s = 0.0
        self._whole = GroupTally()
        self._sketches = {name: QuantileSketch() for name in _DISTRIBUTIONS}
        self._statuses = np.zeros(1 << 15, dtype=np.int64)
        self._tenant_names, self._adapter_names = NameTable[str](), NameTable[str]()
        self._pairs = NameTable[tuple[int, int]]()
        self._alone = NameTable[tuple[int, int]]()
        self._tenants, self._adapters = _Groups(), _Groups()

    def add(self, table: pa.Table) -> None:
        arrival_s = _column(table, "arrival_s")
        if self._first_s is None:
            self._first_s = float(arrival_s[0])
        self._last_s = float(arrival_s[-1])
        since_start_s = arrival_s - self._first_s
        self._whole.add(np.zeros(len(arrival_s), dtype=np.int32), since_start_s)
        columns = {name: _column(table, name) for name in (*_DISTRIBUTIONS, "status")}
        for name, sketch in self._sketches.items():
            sketch.add(columns[name][~np.isnan(columns[name])])
        statuses = columns["status"][~np.isnan(columns["status"])].astype(np.int64)
        self._statuses += np.bincount(np.maximum(statuses, 0), minlength=len(self._statuses))
        tenant = column_indices(table.column("tenant"), self._tenant_names)
        adapter = column_indices(table.column("adapter_name"), self._adapter_names)
        self._adapters.add(pair_indices(tenant, adapter, self._pairs), since_start_s, columns)
        nothing = np.full_like(tenant, -1)
        self._tenants.add(pair_indices(tenant, nothing, self._alone), since_start_s, columns)

    def result(self) -> TraceStats:
        requests = int(self._whole.total("requests").sum())
        span_s = self._last_s - self._first_s if self._first_s is not None else 0.0
        names = (self._tenant_names.names, self._adapter_names.names)
        by_tenant = self._tenants.result(self._alone.names, names, span_s)
        by_adapter = self._adapters.result(self._pairs.names, names, span_s)
        distributions = {name: _distribution(sketch) for name, sketch in self._sketches.items()}
        return TraceStats(
            requests=requests,
            start_s=self._first_s or 0.0,
            span_s=span_s,
            rate_per_s=(requests - 1) / span_s if span_s > 0 else None,
            gap_cv=_known(self._whole.gap_cv()[0]) if requests else None,
            tenants=_skew(by_tenant),
            adapters=_skew(by_adapter),
            statuses={str(status): int(self._statuses[status]) for status in np.flatnonzero(self._statuses)},
            by_tenant=by_tenant,
            by_adapter=by_adapter,
            **distributions,
        )


class _Groups:
    """Sums and latencies of every tenant, or of every (tenant, adapter)."""

    def __init__(self) -> None:
        self._tally = GroupTally(("prompt_tokens", "output_tokens", "errors"))
        self._sketches = {"ttft_s": GroupedSketch(), "e2e_s": GroupedSketch()}

    def add(self, group: npt.NDArray[np.int32], arrival_s: _Floats, columns: dict[str, _Floats]) -> None:
        self._tally.add(
            group,
            arrival_s,
            prompt_tokens=columns["prompt_tokens"],
            output_tokens=columns["output_tokens"],
            errors=(columns["status"] >= 400).astype(np.float64),
        )
        for name, sketch in self._sketches.items():
            known = ~np.isnan(columns[name])
            if known.any():
                sketch.add(group[known], columns[name][known])

    def result(
        self, groups: tuple[tuple[int, int], ...], names: tuple[tuple[str, ...], tuple[str, ...]], span_s: float
    ) -> tuple[GroupStats, ...]:
        """Busiest first, ties by name. ``groups``: (tenant, adapter) of each, indices into ``names``, -1 for none."""
        requests, cv = self._tally.total("requests"), self._tally.gap_cv()
        quantiles = {
            (name, percent): sketch.quantiles(percent / 100, len(groups))
            for name, sketch in self._sketches.items()
            for percent in (50, 99)
        }
        found = [
            GroupStats(
                tenant=names[0][tenant] if tenant >= 0 else None,
                adapter=names[1][adapter] if adapter >= 0 else None,
                requests=int(requests[index]),
                rate_per_s=float(requests[index]) / span_s if span_s > 0 else None,
                gap_cv=_known(cv[index]),
                prompt_tokens=int(self._tally.total("prompt_tokens")[index]),
                output_tokens=int(self._tally.total("output_tokens")[index]),
                errors=int(self._tally.total("errors")[index]),
                ttft_p50_s=_known(quantiles["ttft_s", 50][index]),
                ttft_p99_s=_known(quantiles["ttft_s", 99][index]),
                e2e_p50_s=_known(quantiles["e2e_s", 50][index]),
                e2e_p99_s=_known(quantiles["e2e_s", 99][index]),
            )
            for index, (tenant, adapter) in enumerate(groups)
        ]
        return tuple(sorted(found, key=lambda group: (-group.requests, group.tenant or "", group.adapter or "")))


def _column(table: pa.Table, name: str) -> _Floats:
    """The column as float64 with nan for null."""
    values: _Floats = table.column(name).cast(pa.float64()).to_numpy(zero_copy_only=False)
    return values


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _distribution(sketch: QuantileSketch) -> Distribution | None:
    if not sketch.count:
        return None
    p50, p90, p99 = (sketch.quantile(share) for share in (0.5, 0.9, 0.99))
    return Distribution(count=sketch.count, mean=sketch.total / sketch.count, p50=p50, p90=p90, p99=p99, max=sketch.max)


def _skew(groups: tuple[GroupStats, ...]) -> Skew:
    counts = np.array([group.requests for group in groups], dtype=np.float64)
    total = counts.sum()
    if not total:
        return Skew(distinct=0, top_share=0.0, top_tenth_share=0.0, gini=0.0, zipf=None)
    num = len(counts)
    ascending = counts[::-1]
    gini = float((2 * np.arange(1, num + 1) - num - 1) @ ascending / (num * total))
    return Skew(
        distinct=num,
        top_share=float(counts[0] / total),
        top_tenth_share=float(counts[: max(1, num // 10)].sum() / total),
        gini=gini,
        zipf=zipf_exponent(counts),
    )
