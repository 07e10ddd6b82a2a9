"""OpenTelemetry spans of generation requests: gateway, router, replica and engine, joined by W3C trace contexts.

Off by default: then ``NO_SPAN`` stands for every span, and OpenTelemetry is not imported (a machine that only serves
may lack it). A context is handed on as text in the request itself, and only of a request that is sampled. Spans carry
the attributes of ``ATTRIBUTES`` alone: no text, no token ids, no keys.
"""

import logging
import threading
from collections.abc import Callable
from typing import Literal, Protocol

from loraplex.telemetry.config import TracingConfig

logger = logging.getLogger(__name__)

_CLOSE_S = 2.0

Attribute = str | int | float | bool
Kind = Literal["client", "server", "internal"]

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


class SpanSource(Protocol):
    """Makes the spans that are kept; ``recorded_spans`` has the one of OpenTelemetry."""

    def begin(self, name: str, *, caller: str | None, start_s: float) -> Span:
        """As ``Tracing.begin``."""

    def child(self, name: str, traceparent: str, *, kind: Kind, start_s: float | None) -> Span:
        """As ``Tracing.child``."""


class Tracing:
    """Spans of one process. Without a source none is made. Any thread."""

    def __init__(self, source: SpanSource | None = None, *, on_close: Callable[[], None] = lambda: None) -> None:
        self._source = source
        self._on_close = on_close

    def begin(self, name: str, *, caller: str | None, start_s: float) -> Span:
        """The first span of a request here. ``caller``: the traceparent that came with it, if any: its trace is gone on
        with. ``start_s``: wall clock."""
        if self._source is None:
            return NO_SPAN
        return self._source.begin(name, caller=caller, start_s=start_s)

    def child(
        self, name: str, traceparent: str | None, *, kind: Kind = "internal", start_s: float | None = None
    ) -> Span:
        """A span below that of ``traceparent``; none where that is None. ``start_s``: wall clock; now by default."""
        if self._source is None or traceparent is None:
            return NO_SPAN
        return self._source.child(name, traceparent, kind=kind, start_s=start_s)

    def close(self) -> None:
        """Sends what is left, for a few seconds at most. Idempotent."""
        self._on_close()


def open_tracing(config: TracingConfig, *, service: str, instance: str) -> Tracing:
    """Sends spans to ``config.endpoint`` in the background, as service ``loraplex-SERVICE``; off without one. A
    collector that is away costs spans, never a request."""
    if config.endpoint is None:
        return Tracing()
    # Only here: who traces nothing needs none of it.
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ALWAYS_ON

    from loraplex.telemetry.recorded_spans import RecordedSpans

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
    return Tracing(RecordedSpans(provider.get_tracer("loraplex"), config), on_close=close)
