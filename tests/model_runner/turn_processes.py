"""Processes that take turns when they are told to."""

import fcntl
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

from loraplex.model_runner.turns.queue import TurnQueue

_SPAWN = multiprocessing.get_context("spawn")


class Member:
    """A process that stands in a queue."""

    def __init__(self, path: str, num_places: int) -> None:
        self._ours, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_obey, args=(theirs, path, num_places), daemon=True)
        self._process.start()
        theirs.close()
        self._hear(30)

    def ask(self) -> None:
        """For the turn."""
        self._ours.send("take")

    def gets_it(self, within_s: float = 10.0) -> bool:
        return self._ours.poll(within_s) and self._hear(0) == "taken"

    def hand_over(self, *, and_ask: bool = False) -> None:
        self._ours.send("hand over and take" if and_ask else "hand over")

    @property
    def is_wanted(self) -> bool:
        self._ours.send("wanted")
        return self._hear(10) == "True"

    def sees(self, place: int) -> bool:
        """Another process holds this place. This one has none."""
        self._ours.send(place)
        return self._hear(10) == "taken"

    def stop(self) -> None:
        """It hangs."""
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def _hear(self, within_s: float) -> str:
        assert self._ours.poll(within_s), "the process does not answer"
        return str(self._ours.recv())


@contextmanager
def members(path: str, count: int, *, num_places: int | None = None) -> Iterator[list[Member]]:
    made: list[Member] = []
    try:
        made += [Member(path, num_places or count) for _ in range(count)]
        yield made
    finally:
        for member in made:
            member.kill()


def wait_until(holds: Callable[[], bool], *, within_s: float = 10.0) -> None:
    until_s = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < until_s
        time.sleep(0.005)


def _obey(commands: Connection, path: str, num_places: int) -> None:
    queue = TurnQueue(path, num_places=num_places)
    commands.send("here")
    while True:
        try:
            command = commands.recv()
        except EOFError:
            return
        if isinstance(command, int):
            commands.send(_look(path, command))
            continue
        if command == "wanted":
            commands.send(str(queue.is_wanted))
        if command.startswith("hand over"):
            queue.hand_over()
        if command.endswith("take"):
            queue.take(while_waiting=lambda: None, timeout_s=60.0)
            commands.send("taken")


def _look(path: str, place: int) -> str:
    # Closing the file gives up all that this process holds of it: nothing.
    with open(path, "r+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except OSError:
            return "taken"
        return "free"
