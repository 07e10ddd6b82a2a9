"""Keeps a fixed number of requests in flight until all are answered. Called by ``loraplex bench serve``.

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
    num_requests: int,
    concurrency: int,
    prompt_tokens: int,
    output_tokens: int,
    on_sample: Callable[[Sample], None] | None = None,
) -> list[Sample]:
    """Request i goes to ``targets[i % len(targets)]``. Samples in order of their end; scheduled = sent."""
    samples: list[Sample] = []
    encoded = [
        (target, client.encode(target, prompts.make(index, prompt_tokens), output_tokens))
        for index, target in ((index, targets[index % len(targets)]) for index in range(num_requests))
    ]
    waiting = iter(encoded)
    origin_s = time.perf_counter()

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
            if on_sample is not None:
                on_sample(sample)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, num_requests)):
            group.create_task(worker())
    return samples
