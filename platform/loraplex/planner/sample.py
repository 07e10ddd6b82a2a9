"""A shorter trace to search on: some windows of the long one, as loaded as the whole is. Called by ``search``."""

import numpy as np

from loraplex.traces.arrivals import Arrivals

MAX_REQUESTS = 80_000
NUM_WINDOWS = 12
GAP_S = 60.0
"""Between two windows, so that what one leaves waiting does not burden the next."""


def sampled(arrivals: Arrivals, max_requests: int = MAX_REQUESTS, num_windows: int = NUM_WINDOWS) -> Arrivals:
    """Windows of equal length at even quantiles of the load; the whole when it is short."""
    count = len(arrivals)
    if count <= max_requests:
        return arrivals
    times_s = arrivals.arrival_s
    span_s = float(times_s[-1] - times_s[0])
    num_parts = max(num_windows, round(num_windows * count / max_requests))
    edges = np.searchsorted(times_s, times_s[0] + np.arange(num_parts + 1) * span_s / num_parts, side="left")
    edges[-1] = count
    sizes = np.diff(edges)
    order = np.argsort(sizes, kind="stable")
    quantiles = ((np.arange(num_windows) + 0.5) / num_windows * num_parts).astype(np.int64)
    chosen = np.sort(order[quantiles])
    rows = np.concatenate([np.arange(edges[part], edges[part + 1]) for part in chosen])
    part_s = span_s / num_parts
    shifts = [
        np.full(sizes[part], index * (part_s + GAP_S) - (float(times_s[0]) + part * part_s))
        for index, part in enumerate(chosen)
    ]
    return taken(arrivals, rows, np.maximum.accumulate(np.maximum(times_s[rows] + np.concatenate(shifts), 0.0)))


def taken(arrivals: Arrivals, rows: np.ndarray, arrival_s: np.ndarray) -> Arrivals:
    """``rows`` of ``arrivals`` at other times; the tables of names stay whole."""
    return Arrivals(
        origin_s=arrivals.origin_s,
        arrival_s=arrival_s,
        adapter=arrivals.adapter[rows],
        base_model=arrivals.base_model[rows],
        tenant=arrivals.tenant[rows],
        prompt_tokens=arrivals.prompt_tokens[rows],
        output_tokens=arrivals.output_tokens[rows],
        adapters=arrivals.adapters,
        base_models=arrivals.base_models,
        tenants=arrivals.tenants,
    )


def on_tables_of(known: Arrivals, other: Arrivals) -> Arrivals:
    """``other`` with the indices of ``known``'s tables. Requests of an adapter or base that these lack are left out: no
    plan made from ``known`` knows their costs."""
    adapter_of = {name: index for index, name in enumerate(known.adapters)}
    base_of = {name: index for index, name in enumerate(known.base_models)}
    tenant_of = {name: index for index, name in enumerate(known.tenants)}
    adapter = np.array([adapter_of.get(name, -2) for name in other.adapters] + [-1], dtype=np.int32)[other.adapter]
    base = np.array([base_of.get(name, -2) for name in other.base_models] + [-1], dtype=np.int32)[other.base_model]
    tenant = np.array([tenant_of.get(name, -1) for name in other.tenants] + [-1], dtype=np.int32)[other.tenant]
    rows = np.flatnonzero((adapter > -2) & (base > -2))
    return Arrivals(
        origin_s=other.origin_s,
        arrival_s=other.arrival_s[rows],
        adapter=adapter[rows],
        base_model=base[rows],
        tenant=tenant[rows],
        prompt_tokens=other.prompt_tokens[rows],
        output_tokens=other.output_tokens[rows],
        adapters=known.adapters,
        base_models=known.base_models,
        tenants=known.tenants,
    )
