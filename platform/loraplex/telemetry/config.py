"""The telemetry's own settings: metrics, logs, traces. Composed into the platform's YAML by ``loraplex.config``."""

from typing import Annotated, Literal

import msgspec


class LogConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """What is less is not written."""
    json: bool = False
    """One JSON object a line; otherwise plain lines for terminals."""


class TracingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    endpoint: str | None = None
    """Of an OpenTelemetry collector (OTLP over gRPC), such as ``http://collector:4317``; none: no spans are made.
    Credentials come from the environment, as OpenTelemetry has it (``OTEL_EXPORTER_OTLP_HEADERS``)."""
    sample_rate: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.01
    """Share of the generation requests that are traced."""
    follow_callers: bool = False
    """A request that comes with a trace context is traced if that says so, whatever ``sample_rate``. Only where all
    callers may decide what is recorded. Otherwise such a request goes on with the caller's trace, if it is traced."""
    max_queued_spans: Annotated[int, msgspec.Meta(ge=512)] = 4096
    """Kept for a collector that is slow or away; more are dropped."""


class TelemetryConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    max_tenants: Annotated[int, msgspec.Meta(ge=0)] = 100
    """Tenants with metric labels of their own, in each gateway; further ones are counted together as ``other``."""
    max_adapters: Annotated[int, msgspec.Meta(ge=0)] = 20
    """Adapters with metric labels of their own, in each gateway: those with the most requests."""
    adapter_window_s: Annotated[float, msgspec.Meta(gt=0)] = 300.0
    """How often they are chosen anew."""
    fleet_poll_s: Annotated[float, msgspec.Meta(gt=0)] = 10.0
    """How often a gateway asks the controller for what it tells of plan and groups in its metrics."""
    logs: LogConfig = msgspec.field(default_factory=LogConfig)
    tracing: TracingConfig = msgspec.field(default_factory=TracingConfig)
