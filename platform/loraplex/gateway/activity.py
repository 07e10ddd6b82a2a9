"""What this gateway served lately: who met which targets, by tenant and by adapter.

Keeps the rows of the last minutes on their way to the trace. Read by ``GET /v1/activity``; lives on the gateway's event
loop.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from loraplex.core.clock import Clock
from loraplex.gateway.accounting import Tracer
from loraplex.gateway.status import HTTP_OK
from loraplex.traces.recorder import RecorderCounters
from loraplex.traces.row import ArrivalRow, TraceRow

MAX_WINDOW_S = 300.0
_MAX_ROWS = 10_000
"""So that an answer takes milliseconds; of a busier gateway the window is shorter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """Requests that ended in the window. Latencies are of those answered; None where there is none."""

    requests: int
    errors: int
    """Ended with another status than 200, or were aborted."""
    good: int
    """Answered within all targets."""
    prompt_tokens: int
    output_tokens: int
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    tpot_p50_s: float | None
    tpot_p99_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedAdapter:
    tenant: str
    name: str
    base_model: str | None
    digest: str
    """Of the version asked for last."""
    served: Served


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    window_s: float
    """As asked for, or shorter: of a gateway that just began, or that keeps no more rows."""
    total: Served
    tenants: dict[str, Served]
    """Busiest first, as the next."""
    adapters: tuple[ServedAdapter, ...]


class Activity:
    """A ``Tracer`` that looks at each row and passes it on."""

    def __init__(self, tracer: Tracer, clock: Clock) -> None:
        self._tracer = tracer
        self._clock = clock
        self._begun_s = clock.monotonic_s()
        self._rows: deque[tuple[float, TraceRow]] = deque(maxlen=_MAX_ROWS)
        """(when it ended, row), oldest first."""

    @property
    def counters(self) -> RecorderCounters:
        return self._tracer.counters

    def arrived(self, row: ArrivalRow) -> None:
        self._tracer.arrived(row)

    def record(self, row: TraceRow) -> None:
        now_s = self._clock.monotonic_s()
        while self._rows and self._rows[0][0] < now_s - MAX_WINDOW_S:
            self._rows.popleft()
        self._rows.append((now_s, row))
        self._tracer.record(row)

    def summary(self, *, window_s: float, ttft_s: float, tpot_s: float, max_adapters: int) -> Summary:
        """Of the last ``window_s`` (at most MAX_WINDOW_S) seconds, against these targets."""
        now_s = self._clock.monotonic_s()
        since_s = max(now_s - min(window_s, MAX_WINDOW_S), self._begun_s)
        if len(self._rows) == _MAX_ROWS:
            since_s = max(since_s, self._rows[0][0])
        rows = [row for end_s, row in self._rows if end_s >= since_s]

        def served(some: Iterable[TraceRow]) -> Served:
            return _served(some, ttft_s=ttft_s, tpot_s=tpot_s)

        tenants = _grouped(rows, lambda row: row.tenant)
        of_adapters = [row for row in rows if row.adapter_name is not None]
        adapters = _grouped(of_adapters, lambda row: f"{row.tenant}/{row.adapter_name}@{row.base_model_id}")
        return Summary(
            window_s=now_s - since_s,
            total=served(rows),
            tenants={tenant: served(some) for tenant, some in tenants},
            adapters=tuple(_served_adapter(some, served(some)) for _, some in adapters[:max_adapters]),
        )


def _grouped(rows: Iterable[TraceRow], key: Callable[[TraceRow], str]) -> list[tuple[str, list[TraceRow]]]:
    groups: dict[str, list[TraceRow]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))


def _served_adapter(rows: list[TraceRow], served: Served) -> ServedAdapter:
    last = rows[-1]
    return ServedAdapter(
        tenant=last.tenant,
        name=last.adapter_name or "",
        base_model=last.base_model_id,
        digest=last.adapter_digest or "",
        served=served,
    )


def _served(some: Iterable[TraceRow], *, ttft_s: float, tpot_s: float) -> Served:
    rows = list(some)
    answered = [row for row in rows if row.status == HTTP_OK and row.finish_reason not in ("abort", "error")]
    ttfts_s = sorted(row.ttft_s for row in answered if row.ttft_s is not None)
    tpots_s = sorted(row.tpot_s for row in answered if row.tpot_s is not None)
    good = [row for row in answered if (row.ttft_s or 0.0) <= ttft_s and (row.tpot_s or 0.0) <= tpot_s]
    return Served(
        requests=len(rows),
        errors=len(rows) - len(answered),
        good=len(good),
        prompt_tokens=sum(row.prompt_tokens for row in rows),
        output_tokens=sum(row.output_tokens for row in rows),
        ttft_p50_s=_percentile(ttfts_s, 0.5),
        ttft_p99_s=_percentile(ttfts_s, 0.99),
        tpot_p50_s=_percentile(tpots_s, 0.5),
        tpot_p99_s=_percentile(tpots_s, 0.99),
    )


def _percentile(ascending: list[float], share: float) -> float | None:
    """The nearest of the values."""
    return ascending[round(share * (len(ascending) - 1))] if ascending else None
