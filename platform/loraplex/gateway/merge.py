"""Several token streams read as one, each of which can be stopped alone.

Needed where a stop string may end one choice while its siblings go on: ``TokenStream.abort`` ends a whole dispatch, so
such choices are dispatched one by one.
"""

import asyncio
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from loraplex.core.generation import TokenStream
from loraplex.core.ids import ReplicaId
from loraplex.core.request import RequestOutput


@runtime_checkable
class LocatedStream(Protocol):
    """A token stream that can tell which replica serves it; traces keep that."""

    @property
    def replica_id(self) -> ReplicaId | None: ...


class MergedStream:
    """A TokenStream over others. Owns one pump task per stream, which end with it."""

    def __init__(self, streams: Sequence[TokenStream]) -> None:
        self._streams = tuple(streams)
        self._outputs: asyncio.Queue[tuple[RequestOutput, ...] | BaseException] = asyncio.Queue()
        self._pumps = [asyncio.create_task(self._pump(stream)) for stream in self._streams]
        self._open = len(self._streams)

    @property
    def replica_id(self) -> ReplicaId | None:
        """The replica of the first stream that tells; the others may have been placed elsewhere."""
        located = (stream.replica_id for stream in self._streams if isinstance(stream, LocatedStream))
        return next((replica_id for replica_id in located if replica_id is not None), None)

    async def next_outputs(self) -> tuple[RequestOutput, ...]:
        """As TokenStream; the first error of any stream ends them all."""
        while self._open:
            item = await self._outputs.get()
            if isinstance(item, BaseException):
                self.abort()
                raise item
            if item:
                return item
            self._open -= 1
        return ()

    def abort(self) -> None:
        for index in range(len(self._streams)):
            self.abort_one(index)
        for pump in self._pumps:
            pump.cancel()
        self._open = 0

    def abort_one(self, index: int) -> None:
        """Stops the stream at ``index`` of those given; the others go on."""
        self._streams[index].abort()

    async def _pump(self, stream: TokenStream) -> None:
        try:
            while outputs := await stream.next_outputs():
                self._outputs.put_nowait(outputs)
        except Exception as error:  # handed on, raised by next_outputs
            self._outputs.put_nowait(error)
        else:
            self._outputs.put_nowait(())
