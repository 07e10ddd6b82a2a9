"""OpenTelemetry spans of generation requests: gateway, router, replica and engine, joined by W3C trace contexts.

Off by default: then ``NO_SPAN`` stands for every span, and the SDK is not imported. A context is handed on as text in
the request itself, and only of a request that is sampled. Spans carry the attributes of ``ATTRIBUTES`` alone: no text,
no token ids, no keys.
"""

import logging
import random
import threading
from collections.abc import Callable
from typing import Literal

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from loraplex.telemetry.config import TracingConfig

logger = logging.getLogger(__name__)

_CLOSE_S = 2.0

Attribute = str | int | float | bool
Kind = Literal["client", "server", "internal"]
_KINDS: dict[Kind, SpanKind] = {
    "client": SpanKind.CLIENT,
    "server": SpanKind.SERVER,
    "internal": SpanKind.INTERNAL,
}

ATTRIBUTES = frozenset(
    (
        "request_id",
        "endpoint",
        "tenant",
        "base_model",
        "adapter",
        "adapter_name",
        "replica",
        "gateway",
        "priority",
        "prompt_tokens",
        "cached_tokens",
        "output_tokens",
        "resumed_tokens",
        "num_choices",
        "num_steps",
        "num_unfinished",
        "finish_reason",
        "status",
        "error_code",
    )
)
"""Names without their prefix ``loraplex.``. ``adapter`` is its digest."""


class Span:
    """This one is not recorded, and costs nothing."""

    __slots__ = ()

    @property
    def traceparent(self) -> str | None:
        """The W3C context for children; None: not sampled, there shall be none."""
        return None

    def set(self, **attributes: Attribute) -> None:
        """Names of ``ATTRIBUTES``."""

    def event(self, name: str, **attributes: Attribute) -> None: ...

    def end(self, *, error: str | None = None, at_s: float | None = None) -> None:
        """``error``: a machine word. ``at_s``: wall clock; now by default. Idempotent."""


NO_SPAN = Span()


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


class Tracing:
    """Spans of one process. Without a tracer none is made. Any thread."""

    def __init__(
        self,
        tracer: Tracer | None = None,
        *,
        config: TracingConfig | None = None,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self._tracer = tracer
        self._config = config or TracingConfig()
        self._on_close = on_close

    def begin(self, name: str, *, caller: str | None, start_s: float) -> Span:
        """The first span of a request here. ``caller``: the traceparent that came with it, if any: its trace is gone on
        with. ``start_s``: wall clock."""
        if self._tracer is None:
            return NO_SPAN
        parent = _context(caller)
        theirs = trace.get_current_span(parent).get_span_context()
        if self._config.follow_callers and theirs.is_valid:
            sampled = bool(theirs.trace_flags.sampled)
        else:
            sampled = random.random() < self._config.sample_rate
        if not sampled:
            return NO_SPAN
        return self._start(name, parent, "server", start_s)

    def child(
        self, name: str, traceparent: str | None, *, kind: Kind = "internal", start_s: float | None = None
    ) -> Span:
        """A span below that of ``traceparent``; none where that is None. ``start_s``: wall clock; now by default."""
        if self._tracer is None or traceparent is None:
            return NO_SPAN
        return self._start(name, _context(traceparent), kind, start_s)

    def close(self) -> None:
        """Sends what is left, for a few seconds at most. Idempotent."""
        self._on_close()

    def _start(self, name: str, parent: Context, kind: Kind, start_s: float | None) -> Span:
        assert self._tracer is not None
        return _RecordedSpan(self._tracer.start_span(name, parent, _KINDS[kind], start_time=_ns(start_s)))


def open_tracing(config: TracingConfig, *, service: str, instance: str) -> Tracing:
    """Sends spans to ``config.endpoint`` in the background, as service ``loraplex-SERVICE``; off without one. A
    collector that is away costs spans, never a request."""
    if config.endpoint is None:
        return Tracing()
    # Only here: who traces nothing needs neither SDK nor exporter.
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ALWAYS_ON

    resource = Resource.create({"service.name": f"loraplex-{service}", "service.instance.id": instance})
    provider = TracerProvider(sampler=ALWAYS_ON, resource=resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=config.endpoint, insecure=config.endpoint.startswith("http://"), timeout=5)
    provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=config.max_queued_spans))

    def close() -> None:
        # The provider alone would try for half a minute to reach a collector that is away.
        give_up = threading.Timer(_CLOSE_S, exporter.shutdown)
        give_up.start()
        provider.shutdown()
        give_up.cancel()

    logger.info("spans go to %s", config.endpoint)
    return Tracing(provider.get_tracer("loraplex"), config=config, on_close=close)


def _context(traceparent: str | None) -> Context:
    """Empty for none, or for one that is no W3C context."""
    carrier = {} if traceparent is None else {"traceparent": traceparent}
    return TraceContextTextMapPropagator().extract(carrier, Context())


def _named(attributes: dict[str, Attribute]) -> dict[str, Attribute]:
    assert attributes.keys() <= ATTRIBUTES, "an attribute that spans do not have"
    return {f"loraplex.{name}": value for name, value in attributes.items()}


def _ns(at_s: float | None) -> int | None:
    return None if at_s is None else int(at_s * 1e9)
