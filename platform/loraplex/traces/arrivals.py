"""What replay, simulation and planning need of a trace: who asked for how much, and when, in order of time.

``Arrivals`` is a struct of arrays, whole (``read_arrivals``) or in chunks (``iter_arrivals``); ``load_requests`` gives
the load generator one object per request. Knows nothing of what is done with them.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from loraplex.core.errors import BadConfig, NotFound
from loraplex.traces.names import NameTable, column_indices
from loraplex.traces.order import in_arrival_order
from loraplex.traces.reader import read_traces
from loraplex.traces.sort import sort_by_arrival

ARRIVAL_COLUMNS = (
    "arrival_s",
    "tenant",
    "base_model_id",
    "adapter_name",
    "prompt_tokens",
    "output_tokens",
    "e2e_s",
)
"""``e2e_s`` tells recorded rows, which are nearly in order, from others, which must be."""
_UNIX_S = 1e8
"""Recorded traces count from 1970, all others from their own start."""
_Ints = npt.NDArray[np.int32]


class Window(NamedTuple):
    """Half open, in seconds of the trace: as written, but a recorded trace counts from its first row, not from 1970."""

    start_s: float = 0.0
    end_s: float = np.inf


class AdapterName(NamedTuple):
    """An adapter of a trace: names are the tenant's own, and an adapter has one base."""

    tenant: str | None
    base_model: str | None
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """R requests in order of arrival."""

    origin_s: float
    """What ``arrival_s`` counts from: 0 (recorded traces: the Unix time of the first row) plus the window's start."""
    arrival_s: npt.NDArray[np.float64]
    """[R] float64, not negative, never falling."""
    adapter: _Ints
    """[R] int32, index into ``adapters``; -1: the plain base."""
    base_model: _Ints
    """[R] int32, index into ``base_models``; -1: the trace does not say."""
    tenant: _Ints
    """[R] int32, index into ``tenants``; -1: the trace does not say."""
    prompt_tokens: _Ints
    """[R] int32; -1: the trace does not say."""
    output_tokens: _Ints
    """[R] int32; -1: the trace does not say."""
    adapters: tuple[AdapterName, ...]
    base_models: tuple[str, ...]
    tenants: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.arrival_s)


def iter_arrivals(
    path: str | os.PathLike[str],
    window: Window | None = None,
    *,
    sort: bool = False,
    modified_after_s: float = 0.0,
    unwritten: pa.Table | None = None,
) -> Iterator[Arrivals]:
    """The rows in ``window``, in chunks of about 65,536 at most 524,288 rows; memory does not grow with the trace.

    Indices mean the same in all chunks; a later chunk's tables begin with an earlier one's. ``sort``: sort rows in any
    order (on disk when they are many) instead of refusing them. ``modified_after_s``, ``unwritten`` and errors: as
    ``read_traces``; InvalidInput naming the row that is out of order; BadConfig for a window that ends before it
    starts.
    """
    if window is not None and not 0 <= window.start_s < window.end_s:
        raise BadConfig(f"window {window.start_s}:{window.end_s} is empty or starts before 0", param="window")
    start_s, end_s = window or Window()
    tenants, bases, adapters = NameTable[str](), NameTable[str](), NameTable[AdapterName]()
    adapter_names = NameTable[str]()
    zero_s: float | None = None
    for table in ordered_tables(
        path, ARRIVAL_COLUMNS, sort=sort, modified_after_s=modified_after_s, unwritten=unwritten
    ):
        times_s: npt.NDArray[np.float64] = table.column("arrival_s").to_numpy()
        if zero_s is None:
            zero_s = trace_zero_s(float(times_s[0]))
        if zero_s:
            times_s = times_s - zero_s
        first, last = np.searchsorted(times_s, (start_s, end_s), side="left")
        if first < last:
            part = table.slice(first, last - first)
            tenant = column_indices(part.column("tenant"), tenants)
            base = column_indices(part.column("base_model_id"), bases)
            name = column_indices(part.column("adapter_name"), adapter_names)
            adapter = _adapter_indices(tenant, base, name, tenants.names, bases.names, adapter_names.names, adapters)
            yield Arrivals(
                origin_s=zero_s + start_s,
                arrival_s=times_s[first:last] - start_s,
                adapter=adapter,
                base_model=base,
                tenant=tenant,
                prompt_tokens=_counts(part, "prompt_tokens"),
                output_tokens=_counts(part, "output_tokens"),
                adapters=adapters.names,
                base_models=bases.names,
                tenants=tenants.names,
            )
        if last < len(times_s):
            return


def read_arrivals(
    path: str | os.PathLike[str],
    window: Window | None = None,
    *,
    sort: bool = False,
    modified_after_s: float = 0.0,
    unwritten: pa.Table | None = None,
) -> Arrivals:
    """All rows in ``window`` at once: 28 bytes each. Errors as ``iter_arrivals``; NotFound when there are no rows."""
    chunks = list(iter_arrivals(path, window, sort=sort, modified_after_s=modified_after_s, unwritten=unwritten))
    if not chunks:
        inside = "" if window is None else f" from {window.start_s} to {window.end_s} s"
        raise NotFound(f"trace {os.fspath(path)} has no rows{inside}")
    return Arrivals(
        origin_s=chunks[0].origin_s,
        arrival_s=np.concatenate([chunk.arrival_s for chunk in chunks]),
        adapter=np.concatenate([chunk.adapter for chunk in chunks]),
        base_model=np.concatenate([chunk.base_model for chunk in chunks]),
        tenant=np.concatenate([chunk.tenant for chunk in chunks]),
        prompt_tokens=np.concatenate([chunk.prompt_tokens for chunk in chunks]),
        output_tokens=np.concatenate([chunk.output_tokens for chunk in chunks]),
        adapters=chunks[-1].adapters,
        base_models=chunks[-1].base_models,
        tenants=chunks[-1].tenants,
    )


def ordered_tables(
    path: str | os.PathLike[str],
    columns: tuple[str, ...],
    *,
    sort: bool = False,
    modified_after_s: float = 0.0,
    unwritten: pa.Table | None = None,
) -> Iterator[pa.Table]:
    """``read_traces`` in arrival order, no empty tables; ``columns`` with ``e2e_s``. Errors as ``iter_arrivals``."""
    assert "e2e_s" in columns
    tables = read_traces(path, columns=columns, modified_after_s=modified_after_s, unwritten=unwritten)
    return sort_by_arrival(tables) if sort else in_arrival_order(tables, where=f"trace {os.fspath(path)}")


def trace_zero_s(first_s: float) -> float:
    """What the seconds of a trace whose first row came at ``first_s`` count from."""
    return first_s if first_s > _UNIX_S else 0.0


def _counts(table: pa.Table, name: str) -> _Ints:
    counts: _Ints = pc.fill_null(table.column(name), -1).to_numpy()
    return counts


def _adapter_indices(
    tenant: _Ints,
    base: _Ints,
    name: _Ints,
    tenants: tuple[str, ...],
    bases: tuple[str, ...],
    names: tuple[str, ...],
    adapters: NameTable[AdapterName],
) -> _Ints:
    """Index of (tenant, base, name) per row, -1 where there is no name. [rows] int32."""
    keys = ((tenant.astype(np.int64) + 1) * (len(bases) + 1) + base + 1) * (len(names) + 1) + name + 1
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    of_key = np.full(len(first), -1, dtype=np.int32)
    for position in np.argsort(first):
        row = first[position]
        if name[row] >= 0:
            of_key[position] = adapters.index_of(
                AdapterName(
                    tenants[tenant[row]] if tenant[row] >= 0 else None,
                    bases[base[row]] if base[row] >= 0 else None,
                    names[name[row]],
                )
            )
    return of_key[inverse]


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    """One request of a trace. None: the trace does not say (or, for ``adapter``, the plain base)."""

    arrival_s: float
    """Seconds since the first request of the trace."""
    tenant: str | None
    base_model: str | None
    adapter: str | None
    prompt_tokens: int | None
    output_tokens: int | None


def load_requests(
    path: str | os.PathLike[str], *, duration_s: float | None = None, limit: int | None = None
) -> list[TraceRequest]:
    """The requests of the first ``duration_s`` seconds, at most ``limit`` of them, by arrival.

    Rows in any order are sorted. Errors as ``read_traces``; NotFound also for a trace without rows.
    """
    requests: list[TraceRequest] = []
    first_s: float | None = None
    for chunk in iter_arrivals(path, sort=True):
        if first_s is None:
            first_s = float(chunk.arrival_s[0])
        for row in range(len(chunk)):
            at_s = float(chunk.arrival_s[row]) - first_s
            if (duration_s is not None and at_s >= duration_s) or (limit is not None and len(requests) >= limit):
                return requests
            requests.append(_request(chunk, row, at_s))
    if first_s is None:
        raise NotFound(f"trace {os.fspath(path)} has no rows")
    return requests


def requests_of(arrivals: Arrivals) -> list[TraceRequest]:
    """One object per request, at the times of ``arrivals``."""
    return [_request(arrivals, row, float(at_s)) for row, at_s in enumerate(arrivals.arrival_s)]


def _request(chunk: Arrivals, row: int, at_s: float) -> TraceRequest:
    tenant, base, adapter = int(chunk.tenant[row]), int(chunk.base_model[row]), int(chunk.adapter[row])
    prompt, output = int(chunk.prompt_tokens[row]), int(chunk.output_tokens[row])
    return TraceRequest(
        arrival_s=at_s,
        tenant=chunk.tenants[tenant] if tenant >= 0 else None,
        base_model=chunk.base_models[base] if base >= 0 else None,
        adapter=chunk.adapters[adapter].name if adapter >= 0 else None,
        prompt_tokens=prompt if prompt >= 0 else None,
        output_tokens=output if output >= 0 else None,
    )
