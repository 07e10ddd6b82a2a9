"""Keeps a fixed number of requests in flight until all are answered. Called by ``client_processes``.

Measures what a server can do, not how it copes with load: a slow answer delays the next request (see ``open_loop``).
"""

import asyncio
import time
from collections.abc import Callable, Sequence

from loraplex.loadgen.completion import CompletionClient, Sample
from loraplex.loadgen.prompts import PromptMaker
from loraplex.loadgen.targets import Target


async def run_closed_loop(
    targets: Sequence[Target],
    client: CompletionClient,
    prompts: PromptMaker,
    *,
    indices: Sequence[int],
    concurrency: int,
    prompt_tokens: int,
    output_tokens: int,
    start: Callable[[], float] = time.perf_counter,
) -> list[Sample]:
    """One request for each of ``indices``; request i goes to ``targets[i % len(targets)]``. Samples in order of their
    end; scheduled = sent.

    ``start`` is called once when all requests are made up, and may block: it returns the time.perf_counter() from which
    samples count and before which nothing is sent, so that several processes can begin together.
    """
    samples: list[Sample] = []
    encoded = [
        (target, client.encode(target, prompts.make(index, prompt_tokens), output_tokens))
        for index, target in ((index, targets[index % len(targets)]) for index in indices)
    ]
    waiting = iter(encoded)
    origin_s = start()
    await asyncio.sleep(origin_s - time.perf_counter())

    async def worker() -> None:
        for target, data in waiting:
            sample = await client.run(
                data,
                target=target,
                origin_s=origin_s,
                scheduled_s=time.perf_counter() - origin_s,
                prompt_tokens=prompt_tokens,
            )
            samples.append(sample)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(indices))):
            group.create_task(worker())
    return samples
