"""Streams that are watched while something is broken: what each said, when, by which gateway, and how it ended.

Sampled answers with a seed each, so that the same request says the same wherever it runs. Called by ``bench_faults``.
"""

import asyncio
import json
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx

from loraplex_deployments.gateway_header import GATEWAY_HEADER


@dataclass(slots=True)
class WatchedStream:
    model: str
    prompt: list[int]
    seed: int
    gateway: str = ""
    """Which answered; empty until it did."""
    text: str = ""
    times_s: list[float] = field(default_factory=list)
    """Of each piece of text; time.monotonic()."""
    done: bool = False
    """It was told that the answer is whole."""
    error: str = ""

    def silence_s(self, since_s: float) -> float:
        """Longest time without a piece that reaches beyond ``since_s``."""
        return max((after - before for before, after in pairwise(self.times_s) if after > since_s), default=0.0)


class StreamWatch:
    """Several at a time."""

    def __init__(self, url: str, key: str, *, output_tokens: int) -> None:
        self._url = url
        self._headers = {"authorization": f"Bearer {key}"}
        self._output_tokens = output_tokens
        self.streams: list[WatchedStream] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._progress = asyncio.Event()
        # Each on a connection of its own, so that they spread over the gateways.
        self._http = httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=None))

    def begin(self, streams: list[WatchedStream]) -> None:
        self.streams = streams
        self._tasks = [asyncio.create_task(self._watch(stream)) for stream in streams]
        for task in self._tasks:
            task.add_done_callback(lambda _task: self._progress.set())

    async def wait_pieces(self, count: int) -> None:
        """Until each has said so much, or has ended."""
        while any(len(s.times_s) < count and not t.done() for s, t in zip(self.streams, self._tasks, strict=True)):
            self._progress.clear()
            await self._progress.wait()

    async def wait_end(self) -> None:
        await asyncio.gather(*self._tasks)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._http.aclose()

    async def _watch(self, stream: WatchedStream) -> None:
        body: dict[str, Any] = {
            "model": stream.model,
            "prompt": stream.prompt,
            "max_tokens": self._output_tokens,
            "temperature": 0.8,
            "seed": stream.seed,
            "ignore_eos": True,
            "stream": True,
        }
        try:
            async with self._http.stream(
                "POST", f"{self._url}/v1/completions", json=body, headers=self._headers
            ) as answer:
                stream.gateway = answer.headers.get(GATEWAY_HEADER, "")
                if answer.status_code != 200:
                    stream.error = f"{answer.status_code} {(await answer.aread())[:200]!r}"
                    return
                async for line in answer.aiter_lines():
                    self._take(stream, line)
                    self._progress.set()
        except httpx.HTTPError as error:
            stream.error = f"{type(error).__name__}: {error}"
        if not stream.done and not stream.error:
            stream.error = "it ended without [DONE]"

    @staticmethod
    def _take(stream: WatchedStream, line: str) -> None:
        if not line.startswith("data: "):
            return
        if line == "data: [DONE]":
            stream.done = True
            return
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            stream.error = str(event["error"])
            return
        for choice in event["choices"]:
            if choice["text"]:
                stream.text += choice["text"]
                stream.times_s.append(time.monotonic())


def same_request(stream: WatchedStream) -> WatchedStream:
    return WatchedStream(model=stream.model, prompt=stream.prompt, seed=stream.seed)
