"""Frames that wait for one gateway's stream. A slow gateway gets them merged; one that takes none is cut off.

Lives on the server's event loop. Called by ``server``.
"""

import asyncio

from loraplex.core.wire import ReplicaFrame
from loraplex.replica.frames import merge_frames


class Outbox:
    def __init__(self, *, max_unsent_tokens: int) -> None:
        self._max_unsent_tokens = max_unsent_tokens
        self._frames: list[ReplicaFrame] = []
        self._num_tokens = 0
        self._ready = asyncio.Event()
        self._closed = asyncio.Event()
        self._ended = False

    def put(self, frame: ReplicaFrame) -> None:
        """Never blocks. Closes the outbox when more tokens wait than it may hold."""
        if self._ended:
            return
        self._frames.append(frame)
        self._num_tokens += sum(len(output.tokens) for output in frame.outputs)
        if len(self._frames) > 1 and not frame.outputs:
            # Load reports come for ever, tokens are counted: without this a stuck gateway would gather reports.
            self._frames = [merge_frames(self._frames)]
        if self._num_tokens > self._max_unsent_tokens:
            self.close()
        self._ready.set()

    async def take(self) -> ReplicaFrame | None:
        """All that waits, as one frame, as soon as there is something; None when nothing will come any more."""
        await self._ready.wait()
        if not self._frames:
            return None
        if not self._ended:
            self._ready.clear()
        frames, self._frames, self._num_tokens = self._frames, [], 0
        return merge_frames(frames)

    def end(self) -> None:
        """Takes no more; what waits can still be taken. Idempotent."""
        self._ended = True
        self._ready.set()

    def close(self) -> None:
        """Takes no more and drops what waits. Idempotent."""
        self.end()
        self._frames = []
        self._closed.set()

    @property
    def closed(self) -> bool:
        return self._closed.is_set()

    async def wait_closed(self) -> None:
        """Returns when ``close`` was called, also while a frame that was taken is stuck on its way."""
        await self._closed.wait()
