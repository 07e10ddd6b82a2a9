"""What replay and planning need of a trace: who asked for how much, and when. Sorted, starting at second 0."""

import os
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from loraplex.core.errors import NotFound
from loraplex.traces.reader import read_traces

_COLUMNS = ("arrival_s", "tenant", "base_model_id", "adapter_name", "prompt_tokens", "output_tokens")


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

    Errors as ``read_traces``; NotFound also for a trace without rows.
    """
    tables = [table.select(_COLUMNS) for table in read_traces(path, columns=_COLUMNS)]
    table = pa.concat_tables(tables) if tables else None
    if table is None or table.num_rows == 0:
        raise NotFound(f"trace {os.fspath(path)} has no rows")
    table = table.unify_dictionaries()
    order = pc.sort_indices(table.column("arrival_s"))
    table = table.take(order)
    arrivals_s = pc.subtract(table.column("arrival_s"), table.column("arrival_s")[0])
    table = table.set_column(0, "arrival_s", arrivals_s)
    if duration_s is not None:
        table = table.filter(pc.less(arrivals_s, duration_s))
    if limit is not None:
        table = table.slice(0, limit)
    columns = [table.column(name).to_pylist() for name in _COLUMNS]
    return [
        TraceRequest(
            arrival_s=at_s,
            tenant=tenant,
            base_model=base_model,
            adapter=adapter,
            prompt_tokens=prompt,
            output_tokens=output,
        )
        for at_s, tenant, base_model, adapter, prompt, output in zip(*columns, strict=True)
    ]
