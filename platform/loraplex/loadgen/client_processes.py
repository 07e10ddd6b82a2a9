"""A closed-loop load from several client processes that begin together, so that one core's client is not the limit.

Owns the processes, which end with the run. Called by ``loraplex bench serve``.
"""

import asyncio
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

from loraplex.core.errors import LoraplexError
from loraplex.loadgen.closed_loop import run_closed_loop
from loraplex.loadgen.completion import CompletionClient, Sample
from loraplex.loadgen.config import RequestConfig
from loraplex.loadgen.http_client import HttpClient
from loraplex.loadgen.prompts import PromptMaker
from loraplex.loadgen.targets import Target

_HEAD_START_S = 0.05
"""From the last client's word that it is ready to the first request: all must have heard by then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientLoad:
    """Request i of ``num_requests`` goes to ``targets[i % len(targets)]``; ``streams`` are in flight at a time."""

    url: str
    config: RequestConfig
    targets: tuple[Target, ...]
    prompts: PromptMaker
    num_requests: int
    streams: int
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientRun:
    samples: list[Sample]
    """By process, each in order of their end. Times count from the common start."""
    cpu_s: tuple[float, ...]
    """Of each process, from the common start to its last answer."""


def run_clients(load: ClientLoad, *, num_processes: int, on_start: Callable[[], None] = lambda: None) -> ClientRun:
    """Runs the load to its end. ``on_start`` is called when all requests are made up and none is sent.

    At most one process per stream is used. Raises LoraplexError when one of them fails.
    """
    context = multiprocessing.get_context("spawn")
    num_processes = max(1, min(num_processes, load.streams, load.num_requests))
    pipes: list[Connection] = []
    processes = []
    try:
        for number in range(num_processes):
            pipe, other = context.Pipe()
            process = context.Process(target=_client, args=(other, load, number, num_processes), daemon=True)
            process.start()
            other.close()
            pipes.append(pipe)
            processes.append(process)
        for pipe in pipes:
            _receive(pipe)
        on_start()
        origin_s = time.perf_counter() + _HEAD_START_S
        for pipe in pipes:
            pipe.send(origin_s)
        samples: list[Sample] = []
        cpu_s: list[float] = []
        for pipe in pipes:
            own_samples, own_cpu_s = _receive(pipe)
            samples += own_samples
            cpu_s.append(own_cpu_s)
        for process in processes:
            process.join()
        return ClientRun(samples=samples, cpu_s=tuple(cpu_s))
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _receive(pipe: Connection) -> tuple[list[Sample], float]:
    """The next word of one process: nothing yet, when it is ready, then its samples and CPU seconds."""
    try:
        word: tuple[list[Sample], float] | LoraplexError = pipe.recv()
    except EOFError:
        raise LoraplexError("a client process died") from None
    if isinstance(word, LoraplexError):
        raise word
    return word


def _client(pipe: Connection, load: ClientLoad, number: int, num_processes: int) -> None:
    """The main of process ``number``, which sends every ``num_processes``-th request."""
    try:
        pipe.send(asyncio.run(_run(pipe, load, number, num_processes)))
    except LoraplexError as error:
        pipe.send(error)


async def _run(pipe: Connection, load: ClientLoad, number: int, num_processes: int) -> tuple[list[Sample], float]:
    cpu_s = 0.0

    def start() -> float:
        nonlocal cpu_s
        pipe.send(([], 0.0))
        origin_s: float = pipe.recv()
        cpu_s = time.process_time()
        return origin_s

    http = HttpClient(load.url, connect_timeout_s=load.config.connect_timeout_s)
    try:
        samples = await run_closed_loop(
            load.targets,
            CompletionClient(http, load.config),
            load.prompts,
            indices=range(number, load.num_requests, num_processes),
            concurrency=len(range(number, load.streams, num_processes)),
            prompt_tokens=load.prompt_tokens,
            output_tokens=load.output_tokens,
            start=start,
        )
    finally:
        http.close()
    return samples, time.process_time() - cpu_s
