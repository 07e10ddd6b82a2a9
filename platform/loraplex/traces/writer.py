"""The controller's end of the traces: takes batches, keeps them in memory for seconds, and owns the files on disk.

All file work happens on the writer's own thread, so ``append`` may be called on an event loop. Knows nothing of who
sends. A full disk never reaches the caller: rows wait in memory, then the oldest are dropped, counted and reported.
What no file holds yet, ``unwritten`` tells.
"""

import logging
import secrets
import threading
from collections import OrderedDict, deque

import pyarrow as pa
import pyarrow.compute as pc

from loraplex.core.clock import Clock, SystemClock
from loraplex.core.control import TraceStoreStatus
from loraplex.core.errors import Unavailable
from loraplex.traces.config import TraceConfig
from loraplex.traces.open_requests import OpenRequests
from loraplex.traces.order import MAX_DISORDER_S
from loraplex.traces.parquet import to_parquet
from loraplex.traces.rotation import adopt_orphans, delete_oldest, merge_parts
from loraplex.traces.schema import decode_batch, encode_table
from loraplex.traces.storage import TraceFile, TraceFolder, part_name

_log = logging.getLogger(__name__)
_MAX_SOURCES = 4096
_TEMPORARY_AGE_S = 60.0
_CLOSE_ATTEMPTS = 3
_ROTATE_RETRY_S = 60.0


class TraceWriter:
    """One writer per process and folder; several on one shared URL keep out of each other's way by their run names."""

    def __init__(
        self, config: TraceConfig, url: str, *, folder: TraceFolder | None = None, clock: Clock | None = None
    ) -> None:
        """``url``: a local directory or pyarrow.fs URL, wherever ``config.url`` points. ``folder``: instead of opening
        ``url``. Raises BadConfig for a URL that cannot be opened."""
        self._config = config
        self._url = url
        self._folder = folder or TraceFolder.open(url)
        self._clock = clock or SystemClock()
        self._run = f"{int(self._clock.wall_s() * 1000):013d}{secrets.token_hex(3)}"
        self._sequence = 0
        self._parts: list[TraceFile] = []
        self._seen: OrderedDict[str, int] = OrderedDict()
        self._changed = threading.Condition()
        self._tables: deque[pa.Table] = deque()
        self._buffered_rows = 0
        self._oldest_s = 0.0
        self._writing: list[pa.Table] = []
        self._open = OpenRequests(max_requests=config.max_unwritten_rows)
        self._received = self._written = self._dropped = self._repeated = 0
        self._last_error: str | None = None
        self._rotate_not_before_s = 0.0
        self._started = False
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="trace-writer", daemon=True)

    def start(self) -> None:
        """Starts the thread, which tidies the folder first. Done by the first ``append`` at the latest."""
        with self._changed:
            if not self._started:
                self._started = True
                self._thread.start()

    def append(self, batch: bytes) -> None:
        """Takes one encoded batch; durable within ``write_interval_s``. Any thread, does no I/O.

        Raises InvalidInput when it is no trace batch. A repeat of the source's last batch is accepted and ignored.
        """
        decoded = decode_batch(batch)
        self.start()
        with self._changed:
            if decoded.source and decoded.sequence >= 0:
                if decoded.sequence <= self._seen.get(decoded.source, -1):
                    self._repeated += 1
                    return
                self._seen[decoded.source] = decoded.sequence
                self._seen.move_to_end(decoded.source)
                while len(self._seen) > _MAX_SOURCES:
                    self._seen.popitem(last=False)
            if decoded.arrivals is not None:
                self._open.add(decoded.arrivals)
                self._open.end(decoded.table)
                self._open.forget(self._clock.wall_s() - MAX_DISORDER_S)
            if decoded.table.num_rows == 0:
                return
            if not self._tables:
                self._oldest_s = self._clock.monotonic_s()
            self._tables.append(decoded.table)
            self._received += decoded.table.num_rows
            self._buffered_rows += decoded.table.num_rows
            self._drop_surplus()
            self._changed.notify_all()

    def unwritten(self, since_s: float) -> bytes:
        """The requests that arrived from ``since_s`` (Unix) on and that no file holds yet, for ``decode_table``: rows
        that wait, and requests that have not ended, the latter without what their end will tell. A row that reaches a
        file meanwhile may be in both. Any thread, does no I/O."""
        with self._changed:
            tables = [*self._writing, *self._tables, self._open.table()]
        table = pa.concat_tables(tables)
        return encode_table(table.filter(pc.greater_equal(table.column("arrival_s"), since_s)))

    def status(self) -> TraceStoreStatus:
        with self._changed:
            return TraceStoreStatus(
                url=self._url,
                received_rows=self._received,
                written_rows=self._written,
                buffered_rows=self._buffered_rows + self._writing_rows,
                dropped_rows=self._dropped,
                repeated_batches=self._repeated,
                last_error=self._last_error,
            )

    def close(self) -> None:
        """Writes what is left and ends the thread. Blocks; rows that the disk refuses count as dropped."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def validate(self) -> None:
        """Asserts the state's invariants."""
        with self._changed:
            assert self._buffered_rows == sum(table.num_rows for table in self._tables)
            assert self._buffered_rows <= self._config.max_unwritten_rows
            assert len(self._open) <= self._config.max_unwritten_rows
            assert self._received == self._written + self._buffered_rows + self._writing_rows + self._dropped

    def _work(self) -> None:
        self._tidy()
        while True:
            with self._changed:
                if not self._is_due():
                    self._changed.wait(timeout=self._wait_s())
                closing = self._closing
                due = closing or self._is_due()
            if due:
                for _ in range(_CLOSE_ATTEMPTS if closing else 1):
                    if self._flush():
                        break
            if self._parts and (closing or self._should_rotate()):
                self._rotate()
            if closing:
                self._give_up()
                return

    def _wait_s(self) -> float | None:
        """Until the buffer is due or the parts are to be merged; None: until something is appended."""
        if self._tables:
            return max(0.0, self._oldest_s + self._config.write_interval_s - self._clock.monotonic_s())
        if self._parts:
            return self._config.write_interval_s
        return None

    def _is_due(self) -> bool:
        if self._closing:
            return True
        if not self._tables:
            return False
        waited_s = self._clock.monotonic_s() - self._oldest_s
        crowded = self._last_error is None and self._buffered_rows > self._config.max_unwritten_rows // 2
        return crowded or waited_s >= self._config.write_interval_s

    def _flush(self) -> bool:
        """Writes the whole buffer as one part. False when the disk refused; the rows are back in the buffer then."""
        with self._changed:
            self._writing = list(self._tables)
            self._tables.clear()
            self._buffered_rows = 0
        if not self._writing:
            return True
        name = part_name(self._run, self._sequence)
        try:
            self._folder.create()
            data = to_parquet(pa.concat_tables(self._writing))
            self._folder.write(name, self._run, data)
        except (OSError, pa.ArrowException) as error:
            self._put_back(error)
            return False
        self._parts.append(
            TraceFile(
                name=name,
                run=self._run,
                first=self._sequence,
                last=self._sequence,
                num_bytes=data.size,
                modified_s=self._clock.wall_s(),
            )
        )
        self._sequence += 1
        with self._changed:
            self._written += self._writing_rows
            self._writing = []
            recovered, self._last_error = self._last_error is not None, None
        if recovered:
            _log.warning("trace files are written again; %d rows were dropped so far", self._dropped)
        return True

    def _put_back(self, error: Exception) -> None:
        with self._changed:
            self._tables.extendleft(reversed(self._writing))
            self._buffered_rows += self._writing_rows
            self._writing = []
            self._oldest_s = self._clock.monotonic_s()
            self._drop_surplus()
            first = self._last_error is None
            self._last_error = f"{self._url}: {error}"
        if first:
            _log.error("cannot write trace files to %s, keeping rows in memory: %s", self._url, error)

    @property
    def _writing_rows(self) -> int:
        return sum(table.num_rows for table in self._writing)

    def _drop_surplus(self) -> None:
        """Drops the oldest rows over the limit. Called with the lock held."""
        surplus = self._buffered_rows - self._config.max_unwritten_rows
        while surplus > 0:
            oldest = self._tables.popleft()
            count = min(surplus, oldest.num_rows)
            if count < oldest.num_rows:
                self._tables.appendleft(oldest.slice(count))
            self._buffered_rows -= count
            self._dropped += count
            surplus -= count

    def _give_up(self) -> None:
        with self._changed:
            lost = self._buffered_rows
            self._tables.clear()
            self._buffered_rows = 0
            self._dropped += lost
        if lost:
            _log.error("trace writer closed with %d rows unwritten: %s", lost, self._last_error)

    def _should_rotate(self) -> bool:
        if self._clock.monotonic_s() < self._rotate_not_before_s:
            return False
        age_s = self._clock.wall_s() - self._parts[0].modified_s
        total = sum(part.num_bytes for part in self._parts)
        return age_s >= self._config.rotate_age_s or total >= self._config.rotate_bytes

    def _rotate(self) -> None:
        try:
            present = {file.name for file in self._folder.files()}
            merge_parts(self._folder, [part for part in self._parts if part.name in present])
        except (OSError, pa.ArrowException, Unavailable) as error:
            _log.error("cannot merge trace parts, they stay as they are: %s", error)
            self._rotate_not_before_s = self._clock.monotonic_s() + _ROTATE_RETRY_S
            return
        self._parts = []
        self._tidy()

    def _tidy(self) -> None:
        """What concerns the whole folder: left-over temporary files, other runs' parts, retention."""
        now_s = self._clock.wall_s()
        try:
            self._folder.create()
            self._folder.delete_temporary(older_than_s=now_s - _TEMPORARY_AGE_S)
            adopt_orphans(self._folder, own_run=self._run, still_since_s=now_s - self._config.adopt_age_s)
            delete_oldest(self._folder, own_run=self._run, max_total_bytes=self._config.max_total_bytes)
        except (OSError, pa.ArrowException, Unavailable) as error:
            _log.error("cannot tidy the trace folder %s: %s", self._url, error)
