"""Every metric of the platform, named once: name with unit, meaning, labels, buckets. Knows not who counts.

A process makes one ``GatewayMetrics`` over its own registry and gives it to the parts that count; ``render`` writes
the Prometheus text of ``GET /metrics``.
"""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import Metric

from loraplex.core.control import TraceStoreStatus
from loraplex.core.ids import ReplicaId
from loraplex.core.wire import LoadReport
from loraplex.telemetry.labels import LabelCap

CONTENT_TYPE = CONTENT_TYPE_LATEST

_LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 1.0)


class GatewayMetrics:
    """What one gateway exports. Label values are bounded: endpoints and statuses by code, tenants by ``max_tenants``,
    replicas by the routes."""

    def __init__(self, *, max_tenants: int = 100) -> None:
        self.registry = CollectorRegistry()
        self._tenant = LabelCap(max_tenants)
        self._requests = Counter(
            "loraplex_gateway_requests",
            "Generation requests by HTTP status (gRPC mapped; 499: the client left).",
            ("endpoint", "tenant", "status"),
            registry=self.registry,
        )
        self._tokens = Counter(
            "loraplex_gateway_tokens",
            "Tokens by kind: prompt, cached (part of prompt), output.",
            ("tenant", "kind"),
            registry=self.registry,
        )
        self._running = Gauge(
            "loraplex_gateway_running_requests", "Generation requests in flight.", registry=self.registry
        )
        self._ttft = Histogram(
            "loraplex_gateway_ttft_seconds",
            "Arrival to first token.",
            ("endpoint",),
            buckets=_LATENCY_S,
            registry=self.registry,
        )
        self._tpot = Histogram(
            "loraplex_gateway_tpot_seconds",
            "Mean time per output token after the first.",
            ("endpoint",),
            buckets=_TOKEN_S,
            registry=self.registry,
        )
        self._e2e = Histogram(
            "loraplex_gateway_e2e_seconds",
            "Arrival to the end of the answer.",
            ("endpoint",),
            buckets=_LATENCY_S,
            registry=self.registry,
        )
        self._refused = Counter(
            "loraplex_gateway_refused_calls",
            "Calls of any kind that ended in an error, by HTTP status (gRPC mapped).",
            ("status",),
            registry=self.registry,
        )
        self._control_errors = Counter(
            "loraplex_gateway_control_errors",
            "Failed calls to the controller.",
            ("call",),
            registry=self.registry,
        )
        self._epoch = Gauge("loraplex_snapshot_epoch", "Epoch of the snapshot in use.", registry=self.registry)
        self._version = Gauge("loraplex_snapshot_version", "Version within the epoch.", registry=self.registry)
        self._stale = Counter(
            "loraplex_gateway_stale_snapshots", "Snapshots of an older epoch that were refused.", registry=self.registry
        )
        self._queued = Gauge(
            "loraplex_gateway_queued_generations",
            "Generations that wait in this gateway for a replica that takes them.",
            registry=self.registry,
        )
        self._trace_rows = Counter(
            "loraplex_trace_recorder_rows",
            "Trace rows that left this gateway's buffer: sent, dropped (buffer full), refused (invalid).",
            ("outcome",),
            registry=self.registry,
        )
        self._trace_buffered = Gauge(
            "loraplex_trace_recorder_buffered_rows", "Trace rows not yet delivered.", registry=self.registry
        )
        self._trace_failed_sends = Counter(
            "loraplex_trace_recorder_failed_sends", "Deliveries that were repeated.", registry=self.registry
        )
        self._trace_store = Gauge(
            "loraplex_trace_store_rows",
            "Trace rows of all gateways in the controller since it started, as this gateway last heard: written to "
            "files, buffered, dropped (files cannot be written).",
            ("state",),
            registry=self.registry,
        )
        self._trace_totals: dict[str, int] = {}
        replica = ("replica",)
        self._replica_gauges = {
            field: Gauge(f"loraplex_replica_{field}", meaning, replica, registry=self.registry)
            for field, meaning in (
                ("num_running", "Requests in the running batch."),
                ("num_waiting", "Requests that wait in the replica."),
                ("num_free_pages", "Pages free or reclaimable at once."),
                ("num_queued_tokens", "Prompt tokens not yet prefilled."),
                ("steps", "Steps since the replica started."),
                ("generated_tokens", "Output tokens since the replica started."),
                ("adapter_loads", "Adapter copies to the accelerator that a request waited for, since the start."),
                ("adapter_prefetches", "Adapter copies begun before their request's turn, since the start."),
                ("adapter_hits", "Admissions that found their adapter on the accelerator, since the start."),
            )
        }
        self._replicas: set[ReplicaId] = set()

    def started(self) -> None:
        self._running.inc()

    def finished(
        self,
        *,
        endpoint: str,
        tenant: str,
        status: int,
        prompt_tokens: int,
        cached_tokens: int,
        output_tokens: int,
        ttft_s: float | None,
        tpot_s: float | None,
        e2e_s: float,
    ) -> None:
        """Ends what ``started`` began."""
        tenant = self._tenant(tenant)
        self._running.dec()
        self._requests.labels(endpoint, tenant, str(status)).inc()
        for kind, amount in (("prompt", prompt_tokens), ("cached", cached_tokens), ("output", output_tokens)):
            if amount:
                self._tokens.labels(tenant, kind).inc(amount)
        self._e2e.labels(endpoint).observe(e2e_s)
        if ttft_s is not None:
            self._ttft.labels(endpoint).observe(ttft_s)
        if tpot_s is not None:
            self._tpot.labels(endpoint).observe(tpot_s)

    def refused(self, status: int) -> None:
        self._refused.labels(str(status)).inc()

    def control_error(self, call: str) -> None:
        self._control_errors.labels(call).inc()

    def stale_snapshot(self) -> None:
        self._stale.inc()

    def snapshot(self, *, epoch: int, version: int) -> None:
        self._epoch.set(epoch)
        self._version.set(version)

    def replica_loads(self, loads: Mapping[ReplicaId, LoadReport]) -> None:
        """Replaces the gauges of all replicas; those that are gone disappear."""
        for gone in self._replicas - set(loads):
            for gauge in self._replica_gauges.values():
                gauge.remove(gone)
        self._replicas = set(loads)
        for replica_id, load in loads.items():
            for field, gauge in self._replica_gauges.items():
                gauge.labels(replica_id).set(getattr(load, field))

    def queued(self, num_generations: int) -> None:
        self._queued.set(num_generations)

    def trace_recorder(self, *, sent: int, dropped: int, refused: int, buffered: int, failed_sends: int) -> None:
        """Totals of this process's recorder, which only grow but for ``buffered``."""
        totals = {"sent": sent, "dropped": dropped, "refused": refused, "failed_sends": failed_sends}
        for name, total in totals.items():
            counter = self._trace_failed_sends if name == "failed_sends" else self._trace_rows.labels(name)
            counter.inc(total - self._trace_totals.get(name, 0))
        self._trace_totals = totals
        self._trace_buffered.set(buffered)

    def trace_store(self, status: TraceStoreStatus) -> None:
        self._trace_store.labels("written").set(status.written_rows)
        self._trace_store.labels("buffered").set(status.buffered_rows)
        self._trace_store.labels("dropped").set(status.dropped_rows)

    def render(self, *, per_tenant: bool) -> bytes:
        """Prometheus text, ``CONTENT_TYPE``. Without ``per_tenant``, sums over the tenants and names none."""
        return generate_latest(self.registry if per_tenant else _WithoutTenants(self.registry))


class _WithoutTenants:
    """A view of a registry in which samples that differ in their tenant alone are one."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            sums: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
            for sample in metric.samples:
                labels = tuple((name, value) for name, value in sample.labels.items() if name != "tenant")
                sums[sample.name, labels] = sums.get((sample.name, labels), 0.0) + sample.value
            summed = Metric(metric.name, metric.documentation, metric.type)
            for (name, labels), value in sums.items():
                summed.add_sample(name, dict(labels), value)
            yield summed
