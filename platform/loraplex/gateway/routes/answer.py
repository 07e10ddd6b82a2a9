"""Answers of the generation routes as ASGI responses: drained while the client listens, aborted when it leaves.

Two tasks per answer, none per token: one writes, the other waits for the client to disconnect.
"""

import asyncio
import logging
from collections.abc import Callable

import msgspec
from starlette.responses import Response

from loraplex.core.errors import LoraplexError
from loraplex.gateway.choice import ChoiceDelta
from loraplex.gateway.generation import Generation
from loraplex.gateway.routes.edge import Receive, Scope, Send
from loraplex.gateway.routes.encode import DONE, ChunkEncoder
from loraplex.gateway.routes.errors import error_body

logger = logging.getLogger(__name__)

_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class _Answer(Response):
    """Runs ``_write`` until it ends or the client leaves, whichever is first. Errors raised before the first byte rise
    to the error handlers."""

    def __init__(self, generation: Generation) -> None:
        super().__init__()
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.create_task(self._write(send))
        leaving = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait((writing, leaving), return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        finally:
            self._generation.abort()
            for task in (writing, leaving):
                task.cancel()
            await asyncio.gather(writing, leaving, return_exceptions=True)

    async def _write(self, send: Send) -> None:
        raise NotImplementedError


class EventStream(_Answer):
    """Server-sent events: all events of one engine step in one write, then ``[DONE]``."""

    def __init__(self, generation: Generation, encoder: ChunkEncoder, *, include_usage: bool) -> None:
        super().__init__(generation)
        self._encoder = encoder
        self._include_usage = include_usage

    async def _write(self, send: Send) -> None:
        generation = self._generation
        # The status line waits for the first tokens: until then a refusal can still have its own status.
        deltas = await generation.next_deltas()
        await send({"type": "http.response.start", "status": 200, "headers": list(_SSE_HEADERS)})
        tail = b""
        try:
            while deltas:
                body = self._events(deltas)
                if body:
                    await send({"type": "http.response.body", "body": body, "more_body": True})
                deltas = await generation.next_deltas()
            if self._include_usage:
                tail = self._encoder.usage(generation.usage)
        except LoraplexError as error:
            tail = b"data: " + msgspec.json.encode(error_body(error)) + b"\n\n"
        except Exception as error:
            logger.exception("a stream failed")
            tail = b"data: " + msgspec.json.encode(error_body(error)) + b"\n\n"
        await send({"type": "http.response.body", "body": tail + DONE, "more_body": False})

    def _events(self, deltas: list[ChoiceDelta]) -> bytes:
        """Steps that complete no text, such as a part of a character, give no event."""
        chunk = self._encoder.chunk
        logprobs = self._generation.num_logprobs is not None
        if len(deltas) == 1:
            delta = deltas[0]
            return chunk(delta) if delta.text or logprobs or delta.finish_reason is not None else b""
        return b"".join([chunk(d) for d in deltas if d.text or logprobs or d.finish_reason is not None])


class WholeReply(_Answer):
    """One JSON document, once every choice is finished."""

    def __init__(self, generation: Generation, encode: Callable[[list[list[ChoiceDelta]]], bytes]) -> None:
        """``encode``: the deltas of each choice, in order -> the body."""
        super().__init__(generation)
        self._encode = encode

    async def _write(self, send: Send) -> None:
        own: list[list[ChoiceDelta]] = [[] for _ in range(self._generation.num_choices)]
        while deltas := await self._generation.next_deltas():
            for delta in deltas:
                own[delta.index].append(delta)
        body = self._encode(own)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
