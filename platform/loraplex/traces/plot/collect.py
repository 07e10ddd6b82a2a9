"""What the pictures of a trace show, counted in two passes: first who and how long, then what falls into which bin."""

import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loraplex.core.errors import NotFound
from loraplex.traces.arrivals import iter_arrivals
from loraplex.traces.quantiles import NUM_BINS, bin_of, value_of

RATE_BINS = 600
HEAT_BINS = 120
HEAT_ROWS = 40
_LENGTH_BINS = 40
_Longs = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthHistogram:
    edges: npt.NDArray[np.float64]
    """[B + 1] float64 tokens, evenly spaced on a logarithmic scale."""
    counts: _Longs
    """[B] int64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TracePictures:
    requests: int
    start_s: float
    end_s: float
    """First and last arrival."""
    rate: _Longs
    """[600] int64, requests in each of 600 equal parts of the time."""
    adapters: tuple[str, ...]
    """Busiest first, at most 40."""
    heat: _Longs
    """[len(adapters), 120] int64, requests of an adapter in a part of the time."""
    others: int
    """Requests of adapters that are not shown."""
    prompt_tokens: LengthHistogram | None
    output_tokens: LengthHistogram | None


def collect(path: str | os.PathLike[str]) -> TracePictures:
    """Errors as ``iter_arrivals``; NotFound for a trace without rows."""
    requests = 0
    start_s = end_s = 0.0
    counts = np.zeros(1, dtype=np.int64)
    for chunk in iter_arrivals(path):
        if not requests:
            start_s = float(chunk.arrival_s[0])
        end_s = float(chunk.arrival_s[-1])
        requests += len(chunk)
        now = np.bincount(chunk.adapter + 1, minlength=len(chunk.adapters) + 1)
        counts = now + np.pad(counts, (0, len(now) - len(counts)))
        names = [each.name if each.tenant is None else f"{each.tenant} / {each.name}" for each in chunk.adapters]
    if not requests:
        raise NotFound(f"trace {os.fspath(path)} has no rows")
    shown = [int(index) for index in np.argsort(-counts, kind="stable")[:HEAT_ROWS] if counts[index]]
    row_of = np.full(len(counts), -1)
    row_of[shown] = np.arange(len(shown))

    rate, heat = np.zeros(RATE_BINS, dtype=np.int64), np.zeros(len(shown) * HEAT_BINS, dtype=np.int64)
    lengths = {name: np.zeros(NUM_BINS, dtype=np.int64) for name in ("prompt_tokens", "output_tokens")}
    for chunk in iter_arrivals(path):
        share = (chunk.arrival_s - start_s) / max(end_s - start_s, 1e-9)
        rate += np.bincount(np.minimum((share * RATE_BINS).astype(np.int64), RATE_BINS - 1), minlength=RATE_BINS)
        row = row_of[chunk.adapter + 1]
        place = row * HEAT_BINS + np.minimum((share * HEAT_BINS).astype(np.int64), HEAT_BINS - 1)
        heat += np.bincount(place[row >= 0], minlength=len(heat))
        for name, bins in lengths.items():
            tokens = getattr(chunk, name)
            bins += np.bincount(bin_of(tokens[tokens >= 0].astype(np.float64)), minlength=NUM_BINS)
    return TracePictures(
        requests=requests,
        start_s=start_s,
        end_s=end_s,
        rate=rate,
        adapters=tuple("(base)" if index == 0 else names[index - 1] for index in shown),
        heat=heat.reshape(len(shown), HEAT_BINS),
        others=requests - int(counts[shown].sum()),
        prompt_tokens=_histogram(lengths["prompt_tokens"]),
        output_tokens=_histogram(lengths["output_tokens"]),
    )


def _histogram(fine: _Longs) -> LengthHistogram | None:
    used = np.flatnonzero(fine)
    if not len(used):
        return None
    values = np.maximum(value_of(used), 0.5)
    edges = np.geomspace(max(values[0] * 0.99, 0.5), max(values[-1] * 1.01, 1.0), _LENGTH_BINS + 1)
    counts = np.histogram(np.clip(values, edges[0], edges[-1]), bins=edges, weights=fine[used])[0]
    return LengthHistogram(edges=edges, counts=counts.astype(np.int64))
