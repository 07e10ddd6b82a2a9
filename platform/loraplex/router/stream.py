"""The tokens of one client request on their way back: buffer, wake-up, and what a resubmission needs.

Owns what each generation has got so far, and where it runs. Knows no replicas; the router pushes, the gateway pulls.
"""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from math import inf

import msgspec

from loraplex.core.errors import LoraplexError
from loraplex.core.ids import ReplicaId, RequestId
from loraplex.core.request import EngineRequest, RequestOutput
from loraplex.router.prefixes import prefixes_of
from loraplex.telemetry.tracing import NO_SPAN, Span


class Generation:
    """One unfinished generation."""

    __slots__ = (
        "_num_moves",
        "emitted",
        "expected_service_s",
        "placed_tokens",
        "prompt_service_s",
        "replica_id",
        "request",
        "stream",
        "token_ids",
        "token_service_s",
        "wire_id",
    )

    def __init__(self, request: EngineRequest, stream: "RoutedStream") -> None:
        self.request = request
        self.stream = stream
        self.token_ids = list(request.resumed_token_ids)
        self.emitted = False
        self.replica_id: ReplicaId | None = None
        """Where it runs; None while it waits in the router."""
        self.wire_id = request.request_id
        """Under which a replica knows it."""
        self.placed_tokens = 0
        """Prompt and generated, when it was placed last."""
        self.expected_service_s = 0.0
        """Of GPU time, that it was predicted to take when it was placed last."""
        self.prompt_service_s = 0.0
        """Of that, for ``placed_tokens``."""
        self.token_service_s = 0.0
        """For each token after them."""
        self._num_moves = 0

    @property
    def num_left(self) -> int:
        """Tokens that it may still generate."""
        return self.request.sampling.max_tokens - len(self.token_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and generated."""
        return len(self.request.prompt_token_ids) + len(self.token_ids)

    def left_alive(self) -> None:
        """It was taken from a replica that is up and may still send tokens of it: they must not be taken for those of
        its next run, which therefore has another id."""
        self._num_moves += 1
        self.wire_id = RequestId(f"{self.request.request_id}~{self._num_moves}")

    def resumed_request(self) -> EngineRequest:
        """The request as another replica can go on with it."""
        if self._num_moves == 0 and len(self.token_ids) == len(self.request.resumed_token_ids):
            return self.request
        return replace(self.request, request_id=self.wire_id, resumed_token_ids=tuple(self.token_ids))

    def take(self, output: RequestOutput) -> RequestOutput:
        """Notes what arrived; returns it as the caller shall see it: cached tokens are told once."""
        for token in output.tokens:
            self.token_ids.append(token.token_id)
        if self._num_moves:
            output = msgspec.structs.replace(output, request_id=self.request.request_id)
        if self.emitted and output.num_cached_tokens:
            output = msgspec.structs.replace(output, num_cached_tokens=0)
        self.emitted = True
        return output


class RoutedStream:
    """Implements ``core.generation.TokenStream``. One consumer."""

    def __init__(
        self,
        requests: tuple[EngineRequest, ...],
        *,
        order: int,
        on_abort: Callable[["RoutedStream"], None],
        span: Span = NO_SPAN,
    ) -> None:
        self.order = order
        self.span = span
        """Of its way through the router; ends with it."""
        self.generations: dict[RequestId, Generation] = {r.request_id: Generation(r, self) for r in requests}
        """The unfinished ones."""
        self.first = requests[0]
        self.replica_id: ReplicaId | None = None
        """Where it runs, or ran last; None while it never left the router."""
        self.resumed = False
        """It was on a replica that was lost."""
        self.num_losses = 0
        """Replicas that were lost under it since its last output."""
        self.refused_by: frozenset[ReplicaId] = frozenset()
        """Replicas that had no room for it though they had given a credit, since it was lost or moved last."""
        self.ask_again_s = self.refused_until_s = 0.0
        """Event loop's times, once it was refused: from when on those of ``refused_by`` may be asked again, and until
        when it waits for one that takes it."""
        self.rebalanced = False
        """It went to another replica to end sooner."""
        self.due_s = inf
        """Event loop's time at which its first token is due."""
        self.prefixes = prefixes_of(self.first)
        self.num_waiting = 0
        """Generations of it that the queue counts."""
        self.timer: asyncio.TimerHandle | None = None
        """Set while it waits in the router."""
        self._on_abort = on_abort
        self._buffer: list[RequestOutput] = []
        self._waiter: asyncio.Future[None] | None = None
        self._error: LoraplexError | None = None

    @property
    def pending(self) -> list[Generation]:
        """Those that run nowhere."""
        return [generation for generation in self.generations.values() if generation.replica_id is None]

    async def next_outputs(self) -> tuple[RequestOutput, ...]:
        """As the protocol says; besides ReplicaLost also Overloaded and Unavailable, when it waited in vain."""
        if not self._buffer:
            if self._error is None and self.generations:
                self._waiter = asyncio.get_running_loop().create_future()
                try:
                    await self._waiter
                finally:
                    self._waiter = None
            if not self._buffer and self._error is not None:
                raise self._error
        outputs, self._buffer = tuple(self._buffer), []
        return outputs

    def abort(self) -> None:
        if self.generations:
            self._on_abort(self)
            self.generations.clear()
            self.span.event("aborted")
            self.span.end()
            self.wake()

    def push(self, generation: Generation, output: RequestOutput) -> None:
        """Adds to the buffer without waking anybody."""
        self._buffer.append(generation.take(output))
        self.num_losses = 0
        if output.finish_reason is not None:
            del self.generations[generation.request.request_id]
            if not self.generations:
                self.span.end()

    def fail(self, error: LoraplexError) -> None:
        """The generations can go on nowhere."""
        self._error = error
        self.generations.clear()
        self.span.end(error=error.code)
        self.wake()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
