"""What taking turns costs: the queue by itself, and models that step alone and two at a time.

Processes and locks are real. Called by ``python -m loraplex.model_runner.turns``.
"""

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import chain
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Barrier, Lock
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from loraplex.core.errors import BadConfig
from loraplex.core.ids import BaseModelId
from loraplex.core.request import SamplingParams
from loraplex.core.step import PENDING, Executor, Row, RowStart, StepPlan
from loraplex.model_runner.build import build_executor
from loraplex.model_runner.config import ExecutorConfig
from loraplex.model_runner.turns.executor import TurnExecutor
from loraplex.model_runner.turns.queue import TurnQueue

_MODEL, _CONFIG = "random:tiny-llama", ExecutorConfig(num_threads=1)
_TURN_S = 1e-3
"""Of the turns by which handing over is measured: whoever is next waits by then."""
_WARM = 20
_PATIENCE_S = 30.0


class TurnCost(msgspec.Struct, frozen=True, kw_only=True):
    """Medians."""

    turns: int
    alone_us: float
    """A turn that nobody waits for: taken, looked whether it is wanted, handed over."""
    hand_over_us: float
    """From one process that hands over to the other, which waits and has the turn."""
    hand_over_p99_us: float
    bare_step_us: float
    """From a decode step's end to the next one's, without turns, with as many in flight as may be."""
    alone_step_us: float
    """With turns, while there is nobody else."""
    shared_step_us: float
    """With turns, while another process does the same: its step, the other's, and two times what is between them."""

    @property
    def turn_us(self) -> float:
        """From the last token of one replica's step to the beginning of the other's: handing over, and what the host
        does for a step while nothing runs."""
        return max(0.0, self.shared_step_us / 2 - self.bare_step_us)


def measure_turn_cost(*, num_turns: int, model: str = _MODEL, config: ExecutorConfig = _CONFIG) -> TurnCost:
    """``config``: of an executor with one stage; there is room for two of them beside each other. Two processes are
    started. Raises what the executor does."""
    if config.pp > 1:
        raise BadConfig("of a pipeline a turn is several steps: measure one stage", param="pp")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    stamp, start = context.Value("d", 0.0), context.Barrier(2)

    def both(body: Callable[..., None], *more: object) -> list[Any]:
        """The answers of two processes that run it."""
        pipes = [context.Pipe(duplex=False) for _ in range(2)]
        processes = [context.Process(target=body, args=(theirs, path, start, num_turns, *more)) for _, theirs in pipes]
        for process in processes:
            process.start()
        found = [ours.recv() for ours, _ in pipes]
        for process in processes:
            process.join()
        return found

    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "turns")
        hand_overs = [*chain(*both(_hand_over, stamp))]
        steps: list[_Steps] = both(_step_together, model, config, context.Lock())
        queue = TurnQueue(path, num_places=2)
        alone = _turns_alone(queue, num_turns)
        queue.close()
    return TurnCost(
        turns=num_turns,
        alone_us=_median_us(alone),
        hand_over_us=_median_us(hand_overs),
        hand_over_p99_us=1e6 * statistics.quantiles(hand_overs, n=100)[98],
        bare_step_us=_median_us([*chain(*(one.bare for one in steps))]),
        alone_step_us=_median_us([*chain(*(one.alone for one in steps))]),
        shared_step_us=_median_us([*chain(*(one.shared for one in steps))]),
    )


class _Steps(NamedTuple):
    """Seconds of one process's steps; see ``TurnCost``."""

    bare: list[float]
    alone: list[float]
    shared: list[float]


def _median_us(seconds: list[float]) -> float:
    return 1e6 * statistics.median(seconds)


def _take(queue: TurnQueue) -> None:
    queue.take(while_waiting=lambda: None, timeout_s=_PATIENCE_S)


def _turns_alone(queue: TurnQueue, count: int) -> list[float]:
    seconds = []
    for _ in range(count):
        began_s = time.perf_counter()
        _take(queue)
        assert not queue.is_wanted, "nobody else is there"
        queue.hand_over()
        seconds.append(time.perf_counter() - began_s)
    return seconds


def _hand_over(answers: Connection, path: str, start: Barrier, count: int, stamp: "Synchronized[float]") -> None:
    """In a process of its own, as one of two."""
    queue = TurnQueue(path, num_places=2)
    start.wait()
    seconds = []
    for _ in range(count):
        _take(queue)
        now_s = time.monotonic()
        if stamp.value:
            seconds.append(now_s - stamp.value)
        time.sleep(_TURN_S)
        # Of no use to this process, when it comes next itself.
        stamp.value = time.monotonic() if queue.is_wanted else 0.0
        queue.hand_over()
    queue.close()
    answers.send(seconds)


def _step_together(
    answers: Connection, path: str, start: Barrier, count: int, model: str, config: ExecutorConfig, building: Lock
) -> None:
    """In a process of its own, as one of two."""
    # One after the other: sums of a group that warms up would wait for what the other computes.
    with building:
        executor = build_executor(config, model=model, base_model_id=BaseModelId(model))
        turns = TurnExecutor(executor, TurnQueue(path, num_places=2))
        bare = _steps(executor, count)
        alone = _steps(turns, count, first=count + _WARM + 1)
    start.wait()
    shared = _steps(turns, count, first=2 * (count + _WARM) + 1)
    turns.close()
    # The other may have ended before: what this one did alone then does not count.
    answers.send(_Steps(bare, alone, shared[: count // 2]))


def _steps(executor: Executor, count: int, *, first: int = 1) -> list[float]:
    """Seconds from one decode step's end to the next one's, of one request."""
    size = executor.arena.page_size
    pages = tuple(range(-(-(count + _WARM) // size)))
    start = RowStart(
        slot=0,
        sampling=SamplingParams(max_tokens=count + _WARM + 1, seed=0, temperature=0.0),
        token_ids=(1,),
        num_prompt_tokens=1,
    )

    def plan(position: int, token_id: int) -> StepPlan:
        row = Row(slot=0, token_ids=(token_id,), start=position, pages=pages, adapter=None, samples=True)
        opened = {"releases": (0,), "starts": (start,)} if position == 0 else {"releases": (), "starts": ()}
        return StepPlan(step_id=first + position, rows=(row,), **opened)

    token_id, seconds, ended_s, submitted = 1, [], time.perf_counter(), 0
    for done in range(count + _WARM):
        while submitted < count + _WARM and submitted - done < executor.max_in_flight:
            executor.submit(plan(submitted, token_id if submitted == done else PENDING))
            submitted += 1
        token_id = executor.collect().tokens[0].token_id
        began_s, ended_s = ended_s, time.perf_counter()
        seconds.append(ended_s - began_s)
    return seconds[_WARM:]
