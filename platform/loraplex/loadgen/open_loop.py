"""Sends a schedule at its own times, whatever the server does (no coordinated omission). Called by ``loraplex replay``.

The only thing that can delay a request is this process being too slow; that lag is measured and reported.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Protocol, TypeVar

from loraplex.loadgen.completion import Sample
from loraplex.loadgen.prompts import Prompt, PromptMaker
from loraplex.loadgen.schedule import PlannedRequest
from loraplex.loadgen.targets import Target

_MAX_PREPARED = 1024
_PREPARE_MARGIN_S = 0.002

_Data = TypeVar("_Data")


class Client(Protocol[_Data]):
    """Sends to one server; ``completion.CompletionClient`` does so over HTTP."""

    def encode(self, target: Target, prompt: Prompt, output_tokens: int) -> _Data:
        """What is sent; made before its time comes, in the order of the schedule."""

    async def run(
        self, data: _Data, *, target: Target, origin_s: float, scheduled_s: float, prompt_tokens: int
    ) -> Sample:
        """Sends it now and reads the answer. Never raises for what the server does: that is the sample's error."""


async def run_open_loop(
    schedule: Sequence[PlannedRequest],
    client: Client[_Data],
    prompts: PromptMaker,
    *,
    on_sample: Callable[[Sample], None] | None = None,
) -> list[Sample]:
    """Runs the whole schedule (sorted by time) and waits for every answer. Samples in order of their end.

    ``on_sample`` is called with each, for a progress display.
    """
    samples: list[Sample] = []
    running: set[asyncio.Task[None]] = set()
    prepared = _prepare(schedule, client, prompts)
    ahead = deque(islice(prepared, _MAX_PREPARED))
    origin_s = time.perf_counter()

    async def one(planned: PlannedRequest, data: _Data) -> None:
        sample = await client.run(
            data,
            target=planned.target,
            origin_s=origin_s,
            scheduled_s=planned.at_s,
            prompt_tokens=planned.prompt_tokens,
        )
        samples.append(sample)
        if on_sample is not None:
            on_sample(sample)

    try:
        while ahead:
            planned, data = ahead.popleft()
            due_s = origin_s + planned.at_s
            while len(ahead) < _MAX_PREPARED and due_s - time.perf_counter() > _PREPARE_MARGIN_S:
                more = next(prepared, None)
                if more is None:
                    break
                ahead.append(more)
                await asyncio.sleep(0)  # answers that arrive meanwhile are timed now, not after the preparations
            # Also with nothing to wait for: the request before this one is sent only when the loop gets its turn.
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            task = asyncio.create_task(one(planned, data))
            running.add(task)
            task.add_done_callback(running.discard)
            if not ahead:
                ahead.extend(islice(prepared, 1))
        await asyncio.gather(*running)
    finally:
        for task in running:
            task.cancel()
    return samples


def _prepare(
    schedule: Sequence[PlannedRequest], client: Client[_Data], prompts: PromptMaker
) -> Iterator[tuple[PlannedRequest, _Data]]:
    for planned in schedule:
        prompt = prompts.make(planned.index, planned.prompt_tokens)
        yield planned, client.encode(planned.target, prompt, planned.output_tokens)
