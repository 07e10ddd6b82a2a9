"""Spans of the requests that are traced: each request's time in the replica, and below it at most four of the engine:
its queue, its first step, its prefill, its decoding.

Watches the engine from outside, and only while a traced request runs. On the engine's thread; called by
``engine_loop``.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from loraplex.core.clock import Clock
from loraplex.core.ids import RequestId
from loraplex.core.request import EngineRequest, FinishReason, RequestOutput
from loraplex.core.wire import ReplicaInfo
from loraplex.engine import Engine
from loraplex.telemetry.tracing import NO_SPAN, Span, Tracing


@dataclass(slots=True)
class _Watched:
    span: Span
    since_s: float
    """Wall clock, as the others."""
    first_step_s: float | None = None
    first_step: Span = NO_SPAN
    first_token_s: float | None = None
    num_computed: int = 0
    num_prefill_steps: int = 0
    num_decode_steps: int = 0
    num_tokens: int = 0


class RequestSpans:
    def __init__(self, tracing: Tracing, info: ReplicaInfo, clock: Clock) -> None:
        self._tracing = tracing
        self._info = info
        self._clock = clock
        self._watched: dict[RequestId, _Watched] = {}

    @property
    def active(self) -> bool:
        """False: ``step`` and ``end`` need not be called."""
        return bool(self._watched)

    def begin(self, request: EngineRequest) -> None:
        """The engine has taken it."""
        now_s = self._clock.wall_s()
        span = self._tracing.child("replica", request.traceparent, kind="server", start_s=now_s)
        if span is NO_SPAN:
            return
        span.set(
            request_id=request.request_id,
            replica=self._info.replica_id,
            tenant=request.tenant,
            base_model=self._info.base_model_id,
            priority=request.priority.value,
            prompt_tokens=len(request.prompt_token_ids),
            resumed_tokens=len(request.resumed_token_ids),
        )
        if request.adapter is not None:
            span.set(adapter=request.adapter.digest, adapter_name=request.adapter.name)
        self._watched[request.request_id] = _Watched(span=span, since_s=now_s)

    def step(self, engine: Engine, outputs: Iterable[RequestOutput], *, began_s: float) -> None:
        """A step of the driver, begun at ``began_s``, brought ``outputs``; the requests that they end are still to be
        ended."""
        now_s = self._clock.wall_s()
        for request_id, watched in self._watched.items():
            progress = engine.progress(request_id)
            if progress is None:
                continue
            if progress.num_scheduled > 0 and watched.first_step_s is None:
                self._admitted(watched, began_s, num_unfinished=engine.num_unfinished)
                watched.num_computed = progress.num_cached
                watched.span.set(cached_tokens=progress.num_cached)
            if progress.num_computed > watched.num_computed:
                watched.num_computed = progress.num_computed
                watched.first_step.end(at_s=now_s)
                watched.num_prefill_steps += watched.first_token_s is None
        for output in outputs:
            found = self._watched.get(output.request_id)
            if found is None:
                continue
            if found.first_step_s is None and output.tokens:
                self._admitted(found, began_s, num_unfinished=engine.num_unfinished)
            self._take(found, output, now_s)

    def end(
        self, request_id: RequestId, *, reason: FinishReason = FinishReason.ABORT, error: str | None = None
    ) -> None:
        """It runs here no more."""
        watched = self._watched.pop(request_id, None)
        if watched is None:
            return
        now_s = self._clock.wall_s()
        watched.first_step.end(at_s=now_s)
        if watched.first_token_s is not None:
            decode = self._engine_span("engine.decode", watched, watched.first_token_s)
            decode.set(num_steps=watched.num_decode_steps, output_tokens=watched.num_tokens)
            decode.end(at_s=now_s)
        watched.span.set(output_tokens=watched.num_tokens, finish_reason=reason.value)
        if error is not None:
            watched.span.set(error_code=error)
        watched.span.end(error=error if reason is FinishReason.ERROR else None, at_s=now_s)

    def _admitted(self, watched: _Watched, began_s: float, *, num_unfinished: int) -> None:
        watched.first_step_s = max(began_s, watched.since_s)
        self._engine_span("engine.queue", watched, watched.since_s).end(at_s=watched.first_step_s)
        watched.first_step = self._engine_span("engine.first_step", watched, watched.first_step_s)
        watched.first_step.set(num_unfinished=num_unfinished)

    def _take(self, watched: _Watched, output: RequestOutput, now_s: float) -> None:
        if not output.tokens:
            return
        watched.num_tokens += len(output.tokens)
        if watched.first_token_s is not None:
            watched.num_decode_steps += 1
            return
        assert watched.first_step_s is not None, "a token of a step that never began"
        watched.first_token_s = now_s
        watched.first_step.end(at_s=now_s)
        prefill = self._engine_span("engine.prefill", watched, watched.first_step_s)
        prefill.set(num_steps=max(1, watched.num_prefill_steps))
        prefill.end(at_s=now_s)

    def _engine_span(self, name: str, watched: _Watched, start_s: float) -> Span:
        return self._tracing.child(name, watched.span.traceparent, start_s=start_s)
