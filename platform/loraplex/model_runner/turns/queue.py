"""A queue of processes of one machine, in which the first has the turn.

Knows nothing of steps. The processes share no memory and know each other by the path of a file alone, which holds
nothing: its bytes are locked. Used by ``executor``.
"""

import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue

from loraplex.core.errors import BadConfig

_CHECK_S = 0.5
"""Whoever waits looks this often whether it still may."""


class TurnQueue:
    """One process's place in the queue.

    Byte k of the file is place k; who has locked byte 0 has the turn. One enters at the last place and waits for the
    next one while holding one's own, hand over hand, so that nobody is overtaken. These are POSIX record locks: the
    kernel wakes who waits, and takes back those of a process that ends, however it ends. They belong to the process:
    it makes one queue of a file, and opens that file in no other way.
    """

    def __init__(self, path: str, *, num_places: int) -> None:
        """``path``: of a file on a local disk, made if there is none, the same for all. ``num_places``: how many
        processes there are, at most. BadConfig when the file cannot be opened."""
        assert num_places > 1, "a process alone needs no turns"
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            self._file = os.open(path, flags, 0o600)
        except OSError as error:
            raise BadConfig(f"{path}: the replicas of a group cannot take turns by it: {error.strerror}") from error
        self._last = num_places - 1
        self._has_turn = False
        self._waiter: _Waiter | None = None
        self._closed = False

    @property
    def has_turn(self) -> bool:
        return self._has_turn

    @property
    def is_wanted(self) -> bool:
        """Another process waits for the turn that this one has."""
        assert self._has_turn, "it is another's turn"
        if not _lock_at_once(self._file, 1):
            return True
        _unlock(self._file, 1)
        return False

    def take(
        self, *, while_waiting: Callable[[], None], timeout_s: float, first: Callable[[], None] = lambda: None
    ) -> bool:
        """Waits for the turn; False when there was nobody to wait for. ``first`` is called when it stands in the queue,
        ``while_waiting`` now and then from then on; both may raise. TimeoutError when the turn did not come. After an
        exception the queue can only be closed."""
        assert not self._has_turn, "it has the turn"
        assert not self._closed, "the queue was closed"
        place = self._last + 1
        while place > 0 and _lock_at_once(self._file, place - 1):
            if place <= self._last:
                _unlock(self._file, place)
            place -= 1
        if place > 0:
            self._wait(place, first, while_waiting, timeout_s)
        self._has_turn = True
        return place > 0

    def hand_over(self) -> None:
        """To whoever is next, if anybody."""
        assert self._has_turn, "it is another's turn"
        self._has_turn = False
        _unlock(self._file, 0)

    def close(self) -> None:
        """Leaves the queue. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._has_turn:
            self.hand_over()
        if self._waiter is None:
            os.close(self._file)
        else:
            self._waiter.end()

    def _wait(self, place: int, first: Callable[[], None], while_waiting: Callable[[], None], timeout_s: float) -> None:
        if self._waiter is None:
            self._waiter = _Waiter(self._file, self._last)
        until_s = time.monotonic() + timeout_s
        self._waiter.begin(place)
        first()
        while not self._waiter.arrives(_CHECK_S):
            while_waiting()
            if time.monotonic() >= until_s:
                raise TimeoutError


class _Waiter:
    """Waits in the kernel, which knows no time limit, so that its process can look up."""

    def __init__(self, file: int, last: int) -> None:
        self._file = file
        self._last = last
        self._from: SimpleQueue[int | None] = SimpleQueue()
        self._arrived: SimpleQueue[None] = SimpleQueue()
        threading.Thread(target=self._run, name="turn", daemon=True).start()

    def begin(self, place: int) -> None:
        """``place`` is held, or is none yet."""
        self._from.put(place)

    def arrives(self, within_s: float) -> bool:
        try:
            self._arrived.get(timeout=within_s)
        except Empty:
            return False
        return True

    def end(self) -> None:
        """Closes the file, which gives back all that is held; not before it is at rest, lest it locks another file
        that got the same number."""
        self._from.put(None)

    def _run(self) -> None:
        while (place := self._from.get()) is not None:
            while place > 0:
                fcntl.lockf(self._file, fcntl.LOCK_EX, 1, place - 1)
                if place <= self._last:
                    _unlock(self._file, place)
                place -= 1
            self._arrived.put(None)
        os.close(self._file)


def _lock_at_once(file: int, place: int) -> bool:
    """False: another process holds it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        return False
    return True


def _unlock(file: int, place: int) -> None:
    fcntl.lockf(file, fcntl.LOCK_UN, 1, place)
