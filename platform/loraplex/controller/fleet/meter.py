"""What came lately, from the trace rows that pass through: requests per adapter and second, and who met the targets.

Fed in the controller's trace thread, read on its event loop. Starts empty with each controller; ``replan`` reads the
files instead.
"""

import threading
from collections import Counter, deque
from dataclasses import dataclass, field

import pyarrow as pa

from loraplex.core.clock import Clock
from loraplex.core.ids import BaseModelId
from loraplex.traces.schema import decode_batch

AdapterRate = dict[tuple[BaseModelId, str | None, str], float]
"""Requests per second of each (base, tenant, adapter)."""
_MAX_SOURCES = 4096


@dataclass(slots=True)
class _Second:
    at_s: float
    num_requests: int = 0
    num_good: int = 0
    adapters: Counter[tuple[str, str | None, str]] = field(default_factory=Counter)


class TrafficMeter:
    def __init__(self, clock: Clock, *, ttft_s: float, tpot_s: float, window_s: float) -> None:
        """``ttft_s``, ``tpot_s``: targets. ``window_s``: what is older is forgotten."""
        self._clock, self._ttft_s, self._tpot_s, self._window_s = clock, ttft_s, tpot_s, window_s
        self._seconds: deque[_Second] = deque()
        self._sequences: dict[str, int] = {}
        self._lock = threading.Lock()

    def add(self, batch: bytes) -> None:
        """One encoded batch of rows that the trace store has accepted. A repeat counts once."""
        decoded = decode_batch(batch)
        with self._lock:
            if decoded.source and decoded.sequence >= 0:
                if decoded.sequence <= self._sequences.get(decoded.source, -1):
                    return
                if len(self._sequences) >= _MAX_SOURCES:
                    self._sequences.clear()
                self._sequences[decoded.source] = decoded.sequence
            self._count(decoded.table)

    def attainment(self, window_s: float) -> float | None:
        """Share of the requests of the last ``window_s`` that met all targets; None: there were none."""
        with self._lock:
            recent = self._recent(window_s)
            total = sum(second.num_requests for second in recent)
            return sum(second.num_good for second in recent) / total if total else None

    def rates(self, window_s: float) -> AdapterRate:
        with self._lock:
            counts: Counter[tuple[str, str | None, str]] = Counter()
            for second in self._recent(window_s):
                counts.update(second.adapters)
        return {(BaseModelId(base), tenant, name): n / window_s for (base, tenant, name), n in counts.items()}

    def num_requests(self, window_s: float) -> int:
        with self._lock:
            return sum(second.num_requests for second in self._recent(window_s))

    def _recent(self, window_s: float) -> list[_Second]:
        since_s = self._clock.monotonic_s() - window_s
        return [second for second in self._seconds if second.at_s >= since_s]

    def _count(self, table: pa.Table) -> None:
        now_s = self._clock.monotonic_s()
        while self._seconds and self._seconds[0].at_s < now_s - self._window_s:
            self._seconds.popleft()
        if not self._seconds or now_s - self._seconds[-1].at_s >= 1.0:
            self._seconds.append(_Second(at_s=now_s))
        second = self._seconds[-1]
        columns = ("status", "ttft_s", "tpot_s", "base_model_id", "tenant", "adapter_name")
        for status, ttft_s, tpot_s, base, tenant, name in zip(
            *(table.column(column).to_pylist() for column in columns), strict=True
        ):
            if status is not None and 400 <= status < 500 and status != 429:
                continue  # the client's own mistake
            second.num_requests += 1
            served = status in (None, 200) and ttft_s is not None
            second.num_good += served and ttft_s <= self._ttft_s and (tpot_s is None or tpot_s <= self._tpot_s)
            if base is not None and name is not None:
                second.adapters[base, tenant, name] += 1
