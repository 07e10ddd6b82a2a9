"""The processes of a group: starts them, speaks to them in one order for all, and notices when one dies or hangs.

Knows no steps and no adapters: messages are bytes, but for what the ranks' events say. A group that has lost a rank is
lost as a whole: all processes are killed, and every call raises ExecutorLost. Owned by ``group_executor``.
"""

import logging
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import TypeVar

import msgspec
from torch._C._distributed_c10d import TCPStore

from loraplex.core.errors import ExecutorLost, LoraplexError, error_from_code
from loraplex.model_runner.ranks.channel import RankListener, shut_down
from loraplex.model_runner.ranks.launcher import RankLauncher, RankProcess, RankStart
from loraplex.model_runner.ranks.messages import (
    Allocate,
    Beat,
    Event,
    Failed,
    Hello,
    RankJob,
    Ready,
    Room,
    Staged,
    Started,
    StartFailed,
)
from loraplex.model_runner.ranks.pulse import Pulse

_CONNECT_S = 120.0
"""For all processes to start and connect: torch is imported meanwhile, from a cold disk perhaps."""
_WATCH_S = 0.5

_log = logging.getLogger(__name__)
_encode = msgspec.msgpack.encode
_started = msgspec.msgpack.Decoder(Started)
_event = msgspec.msgpack.Decoder(Event)

_Answer = TypeVar("_Answer")


class RankGroup:
    def __init__(
        self,
        launcher: RankLauncher,
        num_ranks: int,
        *,
        speaker: int,
        timeout_s: float,
        on_staged: Callable[[Staged], None],
    ) -> None:
        """Starts the processes and connects to them. Raises ExecutorLost when one ends or does not come.

        ``speaker``: the rank that answers steps. ``on_staged``: hears of each rank's answers, on another thread.
        """
        self._speaker = speaker
        self._on_staged = on_staged
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._lost: str | None = None
        self._closed = False
        self._busy_since_s: float | None = None
        self._commands: list[Connection] = []
        self._events: list[Connection] = []
        self._processes: list[RankProcess] = []
        # Every rank waits at it for the others; it lives as long as the group.
        self._store = TCPStore(launcher.host, 0, is_master=True, wait_for_workers=False)
        listener = RankListener(launcher.host)
        try:
            for rank in range(num_ranks):
                self._processes.append(
                    launcher.launch(RankStart(rank=rank, address=listener.address, key=listener.key))
                )
            self._connect(listener)
        except BaseException:
            self._end_processes()
            raise
        finally:
            listener.close()
        self._watcher = threading.Thread(target=self._watch, name="rank watch", daemon=True)
        self._watcher.start()

    def load(self, job: Callable[[int], RankJob]) -> int:
        """Has every rank load its part; ``job``: by the port of the rendezvous. Returns the pages of the arena, the
        same on all ranks: as many as fit where least do. Raises what a rank failed with, or ExecutorLost."""
        try:
            self.send(job(self._store.port))
            num_pages = min(answer.num_pages for answer in self._answers(Room))
            self.send(Allocate(num_pages))
            self._answers(Ready)
        except BaseException:
            self.close()
            raise
        return num_pages

    def send(self, message: msgspec.Struct) -> None:
        """To all ranks, each of which gets all messages in one order. Any thread. ExecutorLost."""
        data = _encode(message)
        with self._lock:
            self.check()
            try:
                for connection in self._commands:
                    connection.send_bytes(data)
            except OSError as error:
                raise self._loss(f"a rank cannot be reached: {error}") from error

    def receive(self) -> bytes:
        """The next message of the first shard of the last stage; waits for it. ExecutorLost."""
        return self._receive(self._commands[self._speaker])

    def check(self) -> None:
        """Raises ExecutorLost when a rank is gone or hangs, or the group was closed."""
        if self._lost is not None:
            raise ExecutorLost(self._lost)

    def busy(self, since_s: float | None) -> None:
        """Since when (``time.monotonic``) steps are in flight: only then must ranks get on. None: none is."""
        self._busy_since_s = since_s

    def close(self) -> None:
        """Kills what still runs. Idempotent."""
        self._closed = True
        if self._lost is None:
            self._lost = "the group was closed"
        self._end_processes()
        if threading.current_thread() is not self._watcher:
            self._watcher.join()
        for connection in (*self._commands, *self._events):
            connection.close()

    def _connect(self, listener: RankListener) -> None:
        commands: dict[int, Connection] = {}
        events: dict[int, Connection] = {}
        count = len(self._processes)
        until_s = time.monotonic() + _CONNECT_S
        while len(commands) < count or len(events) < count:
            connection = listener.accept(_WATCH_S)
            if connection is not None:
                # It knew the key: one of ours, which says at once who it is.
                hello = msgspec.msgpack.decode(connection.recv_bytes(), type=Hello)
                (events if hello.events else commands)[hello.rank] = connection
            ended = self._ended()
            if ended is not None:
                raise ExecutorLost(ended)
            if time.monotonic() > until_s:
                raise ExecutorLost(f"{count - len(events)} of {count} ranks did not come within {_CONNECT_S:.0f} s")
        self._commands = [commands[rank] for rank in range(count)]
        self._events = [events[rank] for rank in range(count)]

    def _answers(self, kind: type[_Answer]) -> list[_Answer]:
        """Of every rank, as they come: the others wait for one that failed. Raises the error that it failed with."""
        answers = []
        missing = {connection: rank for rank, connection in enumerate(self._commands)}
        while missing:
            for connection in wait(list(missing)):
                assert isinstance(connection, Connection)
                rank = missing.pop(connection)
                answer = _started.decode(self._receive(connection))
                if isinstance(answer, StartFailed):
                    raise error_from_code(answer.code, answer.message)
                if not isinstance(answer, kind):
                    raise LoraplexError(f"rank {rank} answered {type(answer).__name__}, not {kind.__name__}")
                answers.append(answer)
        return answers

    def _receive(self, connection: Connection) -> bytes:
        try:
            return connection.recv_bytes()
        except (OSError, EOFError) as error:
            raise self._loss("a rank closed its connection") from error

    def _loss(self, what: str) -> ExecutorLost:
        """The watcher knows better why, and soon: it hears of the death, or has cut the connections itself."""
        until_s = time.monotonic() + 2 * _WATCH_S
        while self._lost is None and time.monotonic() < until_s:
            time.sleep(_WATCH_S / 10)
        if self._lost is None:
            self._lose(what)
        return ExecutorLost(self._lost or what)

    def _watch(self) -> None:
        ranks = {connection: rank for rank, connection in enumerate(self._events)}
        pulse = Pulse(len(ranks), timeout_s=self._timeout_s, now_s=time.monotonic())
        while not self._closed and self._lost is None:
            ended: list[int] = []
            failed: list[str] = []
            for connection in wait(list(ranks), timeout=_WATCH_S):
                assert isinstance(connection, Connection)
                rank = ranks[connection]
                try:
                    event = _event.decode(connection.recv_bytes())
                except (OSError, EOFError):
                    ended.append(rank)
                    continue
                if isinstance(event, Beat):
                    pulse.beat(rank, event.progress, time.monotonic())
                elif isinstance(event, Failed):
                    failed.append(f"rank {rank} failed: {event.message}")
                else:
                    self._on_staged(event)
            # One that just ended is the reason why its peers fail.
            trouble = self._end_of(ended) or next(iter(failed), None) or self._ended()
            trouble = trouble or pulse.trouble(time.monotonic(), busy_since_s=self._busy_since_s)
            if trouble is not None and not self._closed:
                self._lose(trouble)

    def _end_of(self, ranks: list[int]) -> str | None:
        """What became of the first of ``ranks``, whose connections broke; None without any."""
        if not ranks:
            return None
        # Its process ends within a moment, and says how.
        until_s = time.monotonic() + _WATCH_S
        while (how := self._processes[ranks[0]].ended()) is None and time.monotonic() < until_s:
            time.sleep(_WATCH_S / 50)
        return f"rank {ranks[0]} ended" + (f": {how}" if how else "")

    def _ended(self) -> str | None:
        for rank, process in enumerate(self._processes):
            how = process.ended()
            if how is not None:
                return f"rank {rank} ended: {how}"
        return None

    def _lose(self, what: str) -> None:
        self._lost = what
        _log.error("a group of %d ranks is lost: %s", len(self._processes), what)
        self._end_processes()
        # Whoever waits for an answer waits no longer.
        for connection in self._commands:
            shut_down(connection)

    def _end_processes(self) -> None:
        for process in self._processes:
            process.kill()
