"""What came lately, from the batches that pass through: arrivals per adapter and second, and, of the requests that
ended, who met the targets.

Fed in the controller's trace thread, read on its event loop. Starts empty with each controller; ``replan`` reads the
files instead.
"""

import threading
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from loraplex.core.clock import Clock
from loraplex.core.ids import BaseModelId
from loraplex.gateway.status import HTTP_CLIENT_GONE
from loraplex.traces.schema import decode_batch

AdapterRate = dict[tuple[BaseModelId, str | None, str], float]
"""Requests per second of each (base, tenant, adapter)."""
_MAX_SOURCES = 4096


@dataclass(slots=True)
class _Second:
    at_s: float
    num_arrived: int = 0
    num_judged: int = 0
    num_good: int = 0
    """Of ``num_judged``."""
    adapters: Counter[tuple[str, str | None, str]] = field(default_factory=Counter)
    """Of ``num_arrived``."""


class TrafficMeter:
    def __init__(self, clock: Clock, *, ttft_s: float, tpot_s: float, window_s: float) -> None:
        """``ttft_s``, ``tpot_s``: targets. ``window_s``: what is older is forgotten."""
        self._clock, self._ttft_s, self._tpot_s, self._window_s = clock, ttft_s, tpot_s, window_s
        self._seconds: deque[_Second] = deque()
        self._sequences: dict[str, int] = {}
        self._lock = threading.Lock()

    def add(self, batch: bytes) -> None:
        """One encoded batch that the trace store has accepted. A repeat counts once."""
        decoded = decode_batch(batch)
        with self._lock:
            if decoded.source and decoded.sequence >= 0:
                if decoded.sequence <= self._sequences.get(decoded.source, -1):
                    return
                if len(self._sequences) >= _MAX_SOURCES:
                    self._sequences.clear()
                self._sequences[decoded.source] = decoded.sequence
            second = self._current()
            self._count_arrivals(second, decoded.table if decoded.arrivals is None else decoded.arrivals)
            self._judge(second, decoded.table)

    def attainment(self, window_s: float) -> float | None:
        """Share of the requests that ended in the last ``window_s`` that met all targets; None: there were none."""
        with self._lock:
            recent = self._recent(window_s)
            total = sum(second.num_judged for second in recent)
            return sum(second.num_good for second in recent) / total if total else None

    def rates(self, window_s: float) -> AdapterRate:
        """Of what arrived in the last ``window_s``, served or not."""
        with self._lock:
            counts: Counter[tuple[str, str | None, str]] = Counter()
            for second in self._recent(window_s):
                counts.update(second.adapters)
        return {(BaseModelId(base), tenant, name): n / window_s for (base, tenant, name), n in counts.items()}

    def num_requests(self, window_s: float) -> int:
        """That arrived."""
        with self._lock:
            return sum(second.num_arrived for second in self._recent(window_s))

    def _recent(self, window_s: float) -> list[_Second]:
        since_s = self._clock.monotonic_s() - window_s
        return [second for second in self._seconds if second.at_s >= since_s]

    def _current(self) -> _Second:
        now_s = self._clock.monotonic_s()
        while self._seconds and self._seconds[0].at_s < now_s - self._window_s:
            self._seconds.popleft()
        if not self._seconds or now_s - self._seconds[-1].at_s >= 1.0:
            self._seconds.append(_Second(at_s=now_s))
        return self._seconds[-1]

    def _count_arrivals(self, second: _Second, table: pa.Table) -> None:
        for prompt_tokens, *adapter in _rows(table, "prompt_tokens", "base_model_id", "tenant", "adapter_name"):
            if not prompt_tokens:
                continue  # nothing that a replica would have had to do
            second.num_arrived += 1
            base, tenant, name = adapter
            if base is not None and name is not None:
                second.adapters[base, tenant, name] += 1

    def _judge(self, second: _Second, table: pa.Table) -> None:
        columns = ("status", "prompt_tokens", "ttft_s", "tpot_s", "e2e_s")
        for status, prompt_tokens, ttft_s, tpot_s, e2e_s in _rows(table, *columns):
            gone = status == HTTP_CLIENT_GONE
            overloaded = status == 429 and prompt_tokens
            if status is not None and 400 <= status < 500 and not overloaded and not gone:
                continue  # the client's own mistake, or more than its tenant may ask for
            if gone and ttft_s is None and e2e_s <= self._ttft_s:
                continue  # it did not wait for what it was promised
            second.num_judged += 1
            served = (gone or status in (None, 200)) and ttft_s is not None
            second.num_good += served and ttft_s <= self._ttft_s and (tpot_s is None or tpot_s <= self._tpot_s)


def _rows(table: pa.Table, *columns: str) -> Iterator[tuple[Any, ...]]:
    return zip(*(table.column(column).to_pylist() for column in columns), strict=True)
