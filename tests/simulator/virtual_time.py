"""Threads on a virtual clock: one runs at a time, and time passes when all of them wait. Deterministic."""

import heapq
import itertools
import threading
from collections import deque
from collections.abc import Callable


class VirtualTime:
    """Implements ``core.clock.Clock``."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self._order = itertools.count()
        self._due: list[tuple[float, int, threading.Semaphore]] = []
        self._all_wait = threading.Semaphore(0)
        self._own = threading.local()
        self._failure: BaseException | None = None

    def monotonic_s(self) -> float:
        return self._now_s

    def wall_s(self) -> float:
        return self._now_s

    def start(self, body: Callable[[], None]) -> None:
        """In a thread of its own, when ``run`` is called."""
        turn = threading.Semaphore(0)

        def run() -> None:
            self._own.turn = turn
            turn.acquire()
            try:
                body()
            except BaseException as error:
                self._failure = error
            self._all_wait.release()

        threading.Thread(target=run, daemon=True).start()
        self._let_run(turn, self._now_s)

    def run(self) -> None:
        """Until nobody is due any more. Raises what a thread raised."""
        while self._due and self._failure is None:
            self._now_s, _, turn = heapq.heappop(self._due)
            turn.release()
            self._all_wait.acquire()
        if self._failure is not None:
            raise self._failure

    def sleep(self, seconds: float) -> None:
        self._let_run(self._own.turn, self._now_s + seconds)
        self._wait()

    def wait(self) -> Callable[[], None]:
        """What ends the wait that the caller begins next, with ``begin_wait``."""
        turn = self._own.turn
        return lambda: self._let_run(turn, self._now_s)

    def begin_wait(self) -> None:
        self._wait()

    def _let_run(self, turn: threading.Semaphore, at_s: float) -> None:
        heapq.heappush(self._due, (at_s, next(self._order), turn))

    def _wait(self) -> None:
        self._all_wait.release()
        self._own.turn.acquire()


class VirtualTurns:
    """Those who stand in one queue, in order; the first has the turn. To be woken for it takes ``turn_s``."""

    def __init__(self, time: VirtualTime, turn_s: float) -> None:
        self.time = time
        self.turn_s = turn_s
        self.places: deque[Callable[[], None] | None] = deque()


class VirtualTurnQueue:
    """One's place, with the interface of ``model_runner.turns.queue.TurnQueue``."""

    def __init__(self, turns: VirtualTurns) -> None:
        self._turns = turns
        self.has_turn = False

    @property
    def is_wanted(self) -> bool:
        assert self.has_turn
        return len(self._turns.places) > 1

    def take(
        self, *, while_waiting: Callable[[], None], timeout_s: float, first: Callable[[], None] = lambda: None
    ) -> bool:
        time, places = self._turns.time, self._turns.places
        has_to_wait = bool(places)
        places.append(time.wait() if has_to_wait else None)
        if has_to_wait:
            first()
            time.begin_wait()
            time.sleep(self._turns.turn_s)
        self.has_turn = True
        return has_to_wait

    def hand_over(self) -> None:
        self.has_turn = False
        places = self._turns.places
        places.popleft()
        if places and (comes := places[0]) is not None:
            comes()

    def close(self) -> None:
        """Nothing is open."""
