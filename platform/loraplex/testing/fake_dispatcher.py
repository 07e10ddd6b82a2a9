"""A Dispatcher without a replica: it replays scripted steps, one token per request and step, as a router would deliver.

Used by the gateway's tests and its capacity measurement.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from loraplex.core.errors import LoraplexError
from loraplex.core.ids import ReplicaId, RequestId
from loraplex.core.request import EngineRequest, FinishReason, OutputToken, RequestOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """What the fake engine answers to one request. Cut at ``max_tokens``, then the reason is LENGTH."""

    tokens: tuple[OutputToken, ...]
    finish_reason: FinishReason = FinishReason.STOP
    num_cached_tokens: int = 0
    error: str | None = None
    error_code: str | None = None
    lost_after: int | None = None
    """Tokens after which ``next_outputs`` raises ``loss`` of the dispatcher."""


class FakeStream:
    """A TokenStream. Written by the dispatcher's clock, read by the gateway."""

    def __init__(self, dispatcher: "FakeDispatcher", requests: tuple[EngineRequest, ...]) -> None:
        self.replica_id = ReplicaId("fake-0")
        self._dispatcher = dispatcher
        self._pending: list[RequestOutput] = []
        self._failure: LoraplexError | None = None
        self._waiting: asyncio.Future[None] | None = None
        self._live = {request.request_id for request in requests}

    @property
    def num_pending(self) -> int:
        """Outputs that the reader has not taken."""
        return len(self._pending)

    async def next_outputs(self) -> tuple[RequestOutput, ...]:
        while not self._pending:
            if self._failure is not None:
                raise self._failure
            if not self._live:
                return ()
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        outputs, self._pending = tuple(self._pending), []
        return outputs

    def abort(self) -> None:
        for request_id in list(self._live):
            self._dispatcher.abort_request(request_id)
        self._live.clear()
        self.wake()

    def push(self, output: RequestOutput) -> None:
        if output.finish_reason is not None:
            self._live.discard(output.request_id)
        self._pending.append(output)

    def fail(self, error: LoraplexError) -> None:
        self._failure = error
        self._live.clear()

    def wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)


class _Running:
    __slots__ = ("position", "request", "script", "stream")

    def __init__(self, request: EngineRequest, script: Script, stream: FakeStream) -> None:
        self.request = request
        self.script = script
        self.stream = stream
        self.position = 0


class FakeDispatcher:
    """Implements ``core.generation.Dispatcher``. One clock for all streams: what one step yields arrives together."""

    def __init__(
        self,
        script: Callable[[EngineRequest], Script],
        *,
        step_s: float = 0.0,
        lockstep: bool = False,
        refusal: LoraplexError | None = None,
        loss: LoraplexError | None = None,
    ) -> None:
        """``step_s``: pause between steps. ``lockstep``: a step waits until every stream has taken the one before, so
        that nothing is coalesced however fast it runs. ``refusal``: raised by each ``dispatch``. ``loss``: see
        ``Script``. The script and the two errors may be replaced at any time."""
        self.requests: list[EngineRequest] = []
        """All that were ever dispatched."""
        self.aborted: list[RequestId] = []
        """Those that were aborted while they ran."""
        self.refusal = refusal
        self.script = script
        self._step_s = step_s
        self._lockstep = lockstep
        self.loss = loss
        self._running: dict[RequestId, _Running] = {}
        self._clock: asyncio.Task[None] | None = None

    @property
    def num_running(self) -> int:
        return len(self._running)

    def dispatch(self, requests: tuple[EngineRequest, ...]) -> FakeStream:
        if self.refusal is not None:
            raise self.refusal
        stream = FakeStream(self, requests)
        for request in requests:
            self.requests.append(request)
            self._running[request.request_id] = _Running(request, self.script(request), stream)
        if self._clock is None or self._clock.done():
            self._clock = asyncio.create_task(self._tick())
        return stream

    def abort_request(self, request_id: RequestId) -> None:
        if self._running.pop(request_id, None) is not None:
            self.aborted.append(request_id)

    async def _tick(self) -> None:
        while self._running:
            await asyncio.sleep(self._step_s)
            while self._lockstep and any(r.stream.num_pending for r in self._running.values()):  # noqa: ASYNC110
                await asyncio.sleep(0)
            touched: dict[int, FakeStream] = {}
            for running in list(self._running.values()):
                touched[id(running.stream)] = running.stream
                self._step(running)
            for stream in touched.values():
                stream.wake()

    def _step(self, running: _Running) -> None:
        script, position = running.script, running.position
        request_id = running.request.request_id
        if position == script.lost_after and self.loss is not None:
            running.stream.fail(self.loss)
            self._running.pop(request_id, None)
            return
        tokens = script.tokens[position : position + 1]
        running.position = position + 1
        finish: FinishReason | None = None
        if running.position >= running.request.sampling.max_tokens:
            finish = FinishReason.LENGTH
        if running.position >= len(script.tokens):
            finish = script.finish_reason
        running.stream.push(
            RequestOutput(
                request_id=request_id,
                tokens=tokens,
                finish_reason=finish,
                num_cached_tokens=script.num_cached_tokens if position == 0 else 0,
                error=script.error if finish is FinishReason.ERROR else None,
                error_code=script.error_code if finish is FinishReason.ERROR else None,
            )
        )
        if finish is not None:
            self._running.pop(request_id, None)
