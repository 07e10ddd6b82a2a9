"""The gateway's end of the traces: takes rows without blocking and hands them on in batches.

Owns the rows that are not delivered yet. Knows nothing of where they go: ``send`` is injected (usually
``ControlPlane.record_traces``). Lives on the gateway's event loop; not thread-safe.
"""

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from loraplex.core.errors import InvalidInput
from loraplex.traces.config import TraceConfig
from loraplex.traces.row import TraceRow
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
    """Delivers rows at least once and in order; a repeated batch carries the same sequence number.

    ``send`` may raise anything to say "try again"; InvalidInput says that trying again is useless.
    """

    def __init__(self, config: TraceConfig, *, send: Callable[[bytes], Awaitable[None]]) -> None:
        self._send = send
        self._config = config
        self._source = secrets.token_hex(8)
        self._sequence = 0
        self._rows: deque[TraceRow] = deque()
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
            self._in_flight = []
            _log.error("trace recorder closed with %d rows unsent", lost)

    async def _run(self) -> None:
        while True:
            if len(self._rows) < self._config.max_batch_rows and not self._closing:
                await self._sleep(self._config.send_interval_s)
            while self._rows:
                await self._send_batch()
                if len(self._rows) < self._config.max_batch_rows and not self._closing:
                    break
            if self._closing and not self._rows:
                return

    async def _send_batch(self) -> None:
        """Moves up to ``max_batch_rows`` rows out of the buffer and returns once they are delivered or refused."""
        count = min(len(self._rows), self._config.max_batch_rows)
        self._in_flight = [self._rows.popleft() for _ in range(count)]
        try:
            data = encode_batch(self._in_flight, source=self._source, sequence=self._sequence)
        except InvalidInput:
            data = self._encode_what_fits()
        wait_s = self._config.retry_first_s
        while self._in_flight:
            try:
                await asyncio.wait_for(self._send(data), timeout=self._config.send_timeout_s)
            except InvalidInput as error:
                _log.error("%d trace rows refused: %s", len(self._in_flight), error.message)
                self._refused += len(self._in_flight)
                self._in_flight = []
            except Exception as error:  # whatever the transport raises means the same: not delivered yet
                self._failed_sends += 1
                _log.warning("trace batch of %d rows not delivered, will retry: %r", len(self._in_flight), error)
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, self._config.retry_max_s)
            else:
                self._sent += len(self._in_flight)
                self._in_flight = []
        self._sequence += 1

    def _encode_what_fits(self) -> bytes:
        """One odd row must not cost its neighbours: each is tried alone and the odd ones are counted as refused."""
        good = []
        for row in self._in_flight:
            try:
                encode_batch([row], source=self._source, sequence=self._sequence)
            except InvalidInput as error:
                _log.error("trace row of request %s refused: %s", row.request_id, error.message)
            else:
                good.append(row)
        self._refused += len(self._in_flight) - len(good)
        self._in_flight = good
        return encode_batch(good, source=self._source, sequence=self._sequence)

    async def _sleep(self, seconds: float) -> None:
        """Until ``seconds`` passed, a batch is full, or ``close`` was called."""
        self._wake.clear()
        if self._closing or len(self._rows) >= self._config.max_batch_rows:
            return
        try:
            await asyncio.wait_for(self._wake.wait(), timeout=seconds)
        except TimeoutError:
            return
