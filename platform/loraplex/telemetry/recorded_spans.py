"""Spans as OpenTelemetry records them. The only importer of its API; imported where spans are kept, and nowhere else.

Called by ``tracing``.
"""

import random

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from loraplex.telemetry.config import TracingConfig
from loraplex.telemetry.tracing import ATTRIBUTES, NO_SPAN, Attribute, Kind, Span

_KINDS: dict[Kind, SpanKind] = {
    "client": SpanKind.CLIENT,
    "server": SpanKind.SERVER,
    "internal": SpanKind.INTERNAL,
}


class RecordedSpans:
    """Implements ``tracing.SpanSource``."""

    def __init__(self, tracer: Tracer, config: TracingConfig) -> None:
        self._tracer = tracer
        self._config = config

    def begin(self, name: str, *, caller: str | None, start_s: float) -> Span:
        parent = _context(caller)
        theirs = trace.get_current_span(parent).get_span_context()
        if self._config.follow_callers and theirs.is_valid:
            sampled = bool(theirs.trace_flags.sampled)
        else:
            sampled = random.random() < self._config.sample_rate
        if not sampled:
            return NO_SPAN
        return self._start(name, parent, "server", start_s)

    def child(self, name: str, traceparent: str, *, kind: Kind, start_s: float | None) -> Span:
        return self._start(name, _context(traceparent), kind, start_s)

    def _start(self, name: str, parent: Context, kind: Kind, start_s: float | None) -> Span:
        return _RecordedSpan(self._tracer.start_span(name, parent, _KINDS[kind], start_time=_ns(start_s)))


class _RecordedSpan(Span):
    __slots__ = ("_span", "_traceparent")

    def __init__(self, span: trace.Span) -> None:
        self._span = span
        context = span.get_span_context()
        self._traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-01"

    @property
    def traceparent(self) -> str | None:
        return self._traceparent

    def set(self, **attributes: Attribute) -> None:
        self._span.set_attributes(_named(attributes))

    def event(self, name: str, **attributes: Attribute) -> None:
        self._span.add_event(name, _named(attributes))

    def end(self, *, error: str | None = None, at_s: float | None = None) -> None:
        if self._span.is_recording():
            if error is not None:
                self._span.set_status(Status(StatusCode.ERROR, error))
            self._span.end(_ns(at_s))


def _context(traceparent: str | None) -> Context:
    """Empty for none, or for one that is no W3C context."""
    carrier = {} if traceparent is None else {"traceparent": traceparent}
    return TraceContextTextMapPropagator().extract(carrier, Context())


def _named(attributes: dict[str, Attribute]) -> dict[str, Attribute]:
    assert attributes.keys() <= ATTRIBUTES, "an attribute that spans do not have"
    return {f"loraplex.{name}": value for name, value in attributes.items()}


def _ns(at_s: float | None) -> int | None:
    return None if at_s is None else int(at_s * 1e9)
