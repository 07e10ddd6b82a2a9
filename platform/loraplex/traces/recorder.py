"""The gateway's end of the traces: takes arrivals and rows without blocking and hands them on in batches.

Owns those that are not delivered yet. Knows nothing of where they go: ``send`` is injected (usually
``ControlPlane.record_traces``). Lives on the gateway's event loop; not thread-safe.
"""

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from loraplex.core.errors import InvalidInput
from loraplex.traces.config import TraceConfig
from loraplex.traces.row import ArrivalRow, TraceRow
from loraplex.traces.schema import encode_batch

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecorderCounters:
    """Rows since the start: recorded = sent + dropped + refused + buffered."""

    recorded: int = 0
    sent: int = 0
    dropped: int = 0
    """Lost because the buffer was full, or because ``close`` ran out of time."""
    refused: int = 0
    """Lost because they did not fit the schema or the receiver called them invalid."""
    failed_sends: int = 0
    """Attempts that were repeated."""
    buffered: int = 0


class TraceRecorder:
    """Delivers rows at least once and in order; a repeated batch carries the same sequence number. An arrival goes with
    its row or before it.

    ``send`` may raise anything to say "try again"; InvalidInput says that trying again is useless.
    """

    def __init__(self, config: TraceConfig, *, send: Callable[[bytes], Awaitable[None]]) -> None:
        self._send = send
        self._config = config
        self._source = secrets.token_hex(8)
        self._sequence = 0
        self._rows: deque[TraceRow] = deque()
        self._arrivals: deque[ArrivalRow] = deque(maxlen=config.max_unsent_rows)
        """The oldest go first when the controller is away: by then they have ended, or do soon."""
        self._in_flight: list[TraceRow] = []
        self._wake = asyncio.Event()
        self._closing = False
        self._task: asyncio.Task[None] | None = None
        self._recorded = self._sent = self._dropped = self._refused = self._failed_sends = 0

    @property
    def counters(self) -> RecorderCounters:
        return RecorderCounters(
            recorded=self._recorded,
            sent=self._sent,
            dropped=self._dropped,
            refused=self._refused,
            failed_sends=self._failed_sends,
            buffered=len(self._rows) + len(self._in_flight),
        )

    async def start(self) -> None:
        """Starts the sending task on the running event loop."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="trace-recorder")

    def arrived(self, row: ArrivalRow) -> None:
        """Takes a request that was let in; as ``record``, which follows when it ends. Counters tell of rows alone."""
        self._arrivals.append(row)

    def record(self, row: TraceRow) -> None:
        """Takes one row; O(1), never blocks, never raises. Drops the oldest row when the buffer is full."""
        self._recorded += 1
        if len(self._rows) + len(self._in_flight) >= self._config.max_unsent_rows and self._rows:
            self._rows.popleft()
            self._dropped += 1
        self._rows.append(row)
        if len(self._rows) >= self._config.max_batch_rows:
            self._wake.set()

    async def close(self) -> None:
        """Sends everything that is left, for ``close_timeout_s`` at most; what remains then counts as dropped."""
        self._closing = True
        self._wake.set()
        await self.start()
        assert self._task is not None
        _, pending = await asyncio.wait([self._task], timeout=self._config.close_timeout_s)
        if pending:
            self._task.cancel()
            await asyncio.wait([self._task])
            lost = len(self._rows) + len(self._in_flight)
            self._dropped += lost
            self._rows.clear()
            self._arrivals.clear()
            self._in_flight = []
            _log.error("trace recorder closed with %d rows unsent", lost)

    async def _run(self) -> None:
        while True:
            if len(self._rows) < self._config.max_batch_rows and not self._closing:
                await self._sleep(self._config.send_interval_s)
            while self._rows or self._arrivals:
                await self._send_batch()
                if len(self._rows) < self._config.max_batch_rows and not self._closing:
                    break
            if self._closing and not self._rows:
                return

    async def _send_batch(self) -> None:
        """Moves up to ``max_batch_rows`` rows and all arrivals out of the buffer and returns once they are delivered or
        refused."""
        count = min(len(self._rows), self._config.max_batch_rows)
        self._in_flight = [self._rows.popleft() for _ in range(count)]
        arrivals = list(self._arrivals)
        self._arrivals.clear()
        try:
            data = self._encoded(self._in_flight, arrivals)
        except InvalidInput:
            data = self._encode_what_fits(arrivals)
        wait_s = self._config.retry_first_s
        while True:
            try:
                await asyncio.wait_for(self._send(data), timeout=self._config.send_timeout_s)
            except InvalidInput as error:
                _log.error("%d trace rows refused: %s", len(self._in_flight), error.message)
                self._refused += len(self._in_flight)
                break
            except Exception as error:  # whatever the transport raises means the same: not delivered yet
                self._failed_sends += 1
                _log.warning("trace batch of %d rows not delivered, will retry: %r", len(self._in_flight), error)
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, self._config.retry_max_s)
            else:
                self._sent += len(self._in_flight)
                break
        self._in_flight = []
        self._sequence += 1

    def _encoded(self, rows: Sequence[TraceRow], arrivals: Sequence[ArrivalRow]) -> bytes:
        return encode_batch(rows, arrivals=arrivals, source=self._source, sequence=self._sequence)

    def _encode_what_fits(self, arrivals: list[ArrivalRow]) -> bytes:
        """One odd row must not cost its neighbours: each is tried alone and the odd ones are counted as refused."""

        def fits(request_id: str, rows: Sequence[TraceRow], arrivals: Sequence[ArrivalRow]) -> bool:
            try:
                self._encoded(rows, arrivals)
            except InvalidInput as error:
                _log.error("trace row of request %s refused: %s", request_id, error.message)
                return False
            return True

        good = [row for row in self._in_flight if fits(row.request_id, [row], ())]
        self._refused += len(self._in_flight) - len(good)
        self._in_flight = good
        return self._encoded(good, [arrival for arrival in arrivals if fits(arrival.request_id, (), [arrival])])

    async def _sleep(self, seconds: float) -> None:
        """Until ``seconds`` passed, a batch is full, or ``close`` was called."""
        self._wake.clear()
        if self._closing or len(self._rows) >= self._config.max_batch_rows:
            return
        try:
            await asyncio.wait_for(self._wake.wait(), timeout=seconds)
        except TimeoutError:
            return
