"""Invocations per interval become arrivals. Owns the shape of the counted rows that formats of counts give."""

import math
from collections.abc import Iterator
from enum import StrEnum
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from loraplex.core.errors import BadConfig, InvalidInput
from loraplex.traces.schema import trace_table

_LABEL = pa.dictionary(pa.int32(), pa.string())
COUNT_SCHEMA = pa.schema(
    [
        pa.field("arrival_s", pa.float64(), nullable=False),
        pa.field("tenant", _LABEL),
        pa.field("adapter_name", _LABEL),
        pa.field("count", pa.int64(), nullable=False),
        pa.field("pattern", _LABEL),
        pa.field("shape", pa.float64()),
    ]
)
"""``arrival_s``: start of the interval. ``pattern`` and ``shape``: fit of the gaps, Gamma or Weibull, where known."""
_Floats = npt.NDArray[np.float64]


class Spread(StrEnum):
    """Where in its interval a counted request arrives."""

    UNIFORM = "uniform"
    """Anywhere with equal chance, exactly as many as counted: a Poisson process, given its count."""
    GAMMA = "gamma"
    """A Gamma process of the interval's rate and a chosen CV, cut at the interval's end, as AlpaServe replays them."""
    FITTED = "fitted"
    """Exactly as many as counted, with gaps of the fitted pattern, stretched to fill the interval."""


def count_table(known: dict[str, pa.Array | pa.ChunkedArray], *, where: str) -> pa.Table:
    """In COUNT_SCHEMA. Raises InvalidInput naming ``where`` for counts and times that cannot be."""
    rows = len(known["arrival_s"])
    columns = []
    for field in COUNT_SCHEMA:
        column = known.get(field.name, pa.nulls(rows, field.type))
        if pa.types.is_dictionary(field.type) and not pa.types.is_dictionary(column.type):
            column = column.dictionary_encode()
        columns.append(column.cast(field.type))
    table = pa.table(columns, schema=COUNT_SCHEMA)
    for name in ("arrival_s", "count"):
        column = table.column(name)
        if column.null_count or not pc.all(pc.greater_equal(column, 0)).as_py():
            raise InvalidInput(f"{where}: a count or its time is missing or negative", code="invalid_trace")
    return table


class CountSpreader:
    """Turns counted rows, sorted by time, into requests, sorted by time. Holds the rows of one interval."""

    def __init__(self, *, interval_s: float, spread: Spread, cv: float, scale: float, seed: int) -> None:
        """``scale``: multiplies the counts; what is left over a whole number is drawn by lot."""
        if not (cv > 0 and math.isfinite(cv)):
            raise BadConfig(f"cv is {cv}, must be greater than 0", param="cv")
        self._interval_s = interval_s
        self._spread = spread
        self._cv = cv
        self._scale = scale
        self._seed = seed

    def requests(self, tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
        """Tables in TRACE_SCHEMA."""
        for interval in _by_interval(tables):
            made = self._interval(interval)
            if made.num_rows:
                yield made

    def _interval(self, counted: pa.Table) -> pa.Table:
        start_s = float(counted.column("arrival_s")[0].as_py())
        rng = np.random.default_rng([self._seed, 4, int(start_s)])
        if self._spread is not Spread.FITTED:
            counted = counted.group_by(["tenant", "adapter_name"], use_threads=False).aggregate([("count", "sum")])
            counted = counted.rename_columns({"count_sum": "count"})
        expected = counted.column("count").to_numpy() * self._scale
        if self._spread is Spread.GAMMA:
            offsets = [self._gamma(rng, mean) for mean in expected]
        else:
            counts = np.floor(expected + rng.random(len(expected))).astype(np.int64)
            if self._spread is Spread.FITTED:
                patterns, shapes = counted.column("pattern").to_pylist(), counted.column("shape").to_pylist()
                offsets = [self._fitted(rng, *each) for each in zip(counts.tolist(), patterns, shapes, strict=True)]
            else:
                offsets = np.split(rng.random(int(counts.sum())) * self._interval_s, np.cumsum(counts)[:-1])
        rows = np.repeat(np.arange(len(offsets)), [len(part) for part in offsets])
        arrival_s = start_s + np.concatenate(offsets)
        order = np.argsort(arrival_s, kind="stable")
        taken = pa.array(rows[order])
        labels = {name: counted.column(name).take(taken).combine_chunks() for name in ("tenant", "adapter_name")}
        return trace_table({"arrival_s": pa.array(arrival_s[order]), **labels})

    def _gamma(self, rng: np.random.Generator, mean: float) -> _Floats:
        """Offsets of a Gamma process with ``mean`` arrivals an interval. [N] float64, under the interval."""
        if mean <= 0:
            return np.empty(0)
        shape, scale = 1 / self._cv**2, self._cv**2 * self._interval_s / mean
        offsets = np.zeros(1)
        while offsets[-1] < self._interval_s:
            gaps = rng.gamma(shape, scale, size=math.ceil(mean) + 16)
            offsets = np.concatenate([offsets, offsets[-1] + np.cumsum(gaps)])
        return offsets[1 : int(np.searchsorted(offsets, self._interval_s))]

    def _fitted(self, rng: np.random.Generator, count: int, pattern: str | None, shape: float | None) -> _Floats:
        """[count] float64, under the interval."""
        if pattern not in ("Gamma", "Weibull") or shape is None or not shape > 0:
            raise InvalidInput(
                f"no fit {pattern!r} with shape {shape}: spread the counts uniformly", code="invalid_trace"
            )
        drawn = rng.gamma(shape, size=count + 1) if pattern == "Gamma" else rng.weibull(shape, size=count + 1)
        passed = np.cumsum(np.maximum(drawn, np.finfo(np.float64).tiny))
        offsets: _Floats = np.minimum(passed[:-1] / passed[-1], 1 - 2**-53) * self._interval_s
        return offsets


def _by_interval(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """One table for each distinct ``arrival_s``."""
    held: list[pa.Table] = []
    for table in tables:
        starts_s = table.column("arrival_s").to_numpy()
        cuts = [0, *(np.flatnonzero(np.diff(starts_s)) + 1).tolist(), len(starts_s)]
        for first, last in pairwise(cuts):
            part = table.slice(first, last - first)
            if held and held[0].column("arrival_s")[0] != part.column("arrival_s")[0]:
                yield pa.concat_tables(held).unify_dictionaries().combine_chunks()
                held = []
            held.append(part)
    if held:
        yield pa.concat_tables(held).unify_dictionaries().combine_chunks()
