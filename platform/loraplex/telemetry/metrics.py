"""What one gateway counts. A process makes one ``GatewayMetrics`` and gives it to the parts that count."""

from prometheus_client import CollectorRegistry

from loraplex.core.control import TraceStoreStatus
from loraplex.core.ids import TenantName
from loraplex.telemetry import catalogue
from loraplex.telemetry.config import TelemetryConfig
from loraplex.telemetry.exposition import render
from loraplex.telemetry.fleet_metrics import FleetMetrics
from loraplex.telemetry.instruments import counter, gauge, histogram, summary
from loraplex.telemetry.labels import OTHER, LabelCap, TopValues
from loraplex.telemetry.replica_metrics import ReplicaMetrics

_AdapterName = tuple[TenantName, str]


class GatewayMetrics:
    def __init__(self, config: TelemetryConfig | None = None) -> None:
        config = config or TelemetryConfig()
        registry = self._registry = CollectorRegistry()
        self.replicas = ReplicaMetrics(registry)
        self.fleet = FleetMetrics(registry)
        self._requests = counter(catalogue.REQUESTS, registry)
        self._tokens = counter(catalogue.TOKENS, registry)
        self._running = gauge(catalogue.RUNNING, registry)
        self._queued = gauge(catalogue.QUEUED, registry)
        self._ready = gauge(catalogue.READY, registry)
        self._ttft = histogram(catalogue.TTFT, registry)
        self._tpot = histogram(catalogue.TPOT, registry)
        self._e2e = histogram(catalogue.E2E, registry)
        self._refused = counter(catalogue.REFUSED, registry)
        self._control_errors = counter(catalogue.CONTROL_ERRORS, registry)
        self._stale = counter(catalogue.STALE_SNAPSHOTS, registry)
        self._epoch = gauge(catalogue.SNAPSHOT_EPOCH, registry)
        self._version = gauge(catalogue.SNAPSHOT_VERSION, registry)
        self._tenant = LabelCap(config.max_tenants)
        self._tenant_requests = counter(catalogue.TENANT_REQUESTS, registry)
        self._tenant_tokens = counter(catalogue.TENANT_TOKENS, registry)
        self._adapters: TopValues[_AdapterName] = TopValues(
            config.max_adapters, window_s=config.adapter_window_s, on_leave=self._forget_adapter
        )
        self._adapter_requests = counter(catalogue.ADAPTER_REQUESTS, registry)
        self._adapter_tokens = counter(catalogue.ADAPTER_OUTPUT_TOKENS, registry)
        self._adapter_ttft = summary(catalogue.ADAPTER_TTFT, registry)
        self._trace_rows = counter(catalogue.TRACE_ROWS, registry)
        self._trace_buffered = gauge(catalogue.TRACE_BUFFERED, registry)
        self._trace_failed_sends = counter(catalogue.TRACE_FAILED_SENDS, registry)
        self._trace_store = gauge(catalogue.TRACE_STORE, registry)
        self._trace_totals: dict[str, int] = {}

    def started(self) -> None:
        self._running.inc()

    def finished(
        self,
        *,
        endpoint: str,
        tenant: TenantName,
        adapter: str | None,
        status: int,
        prompt_tokens: int,
        cached_tokens: int,
        output_tokens: int,
        ttft_s: float | None,
        tpot_s: float | None,
        e2e_s: float,
        now_s: float,
    ) -> None:
        """Ends what ``started`` began. ``adapter``: a name of the tenant's; None: the plain base, or a model that is
        unknown. ``now_s``: of a clock that never goes back."""
        outcome = _outcome(status)
        self._running.dec()
        self._requests.labels(endpoint, str(status)).inc()
        tenant_label = self._tenant(tenant)
        self._tenant_requests.labels(tenant_label, outcome).inc()
        for kind, amount in (("prompt", prompt_tokens), ("cached", cached_tokens), ("output", output_tokens)):
            if amount:
                self._tokens.labels(kind).inc(amount)
                self._tenant_tokens.labels(tenant_label, kind).inc(amount)
        self._e2e.labels(endpoint).observe(e2e_s)
        if ttft_s is not None:
            self._ttft.labels(endpoint).observe(ttft_s)
        if tpot_s is not None:
            self._tpot.labels(endpoint).observe(tpot_s)
        if adapter is not None:
            labels = (tenant, adapter) if self._adapters.count((tenant, adapter), now_s) else (OTHER, OTHER)
            self._adapter_requests.labels(*labels, outcome).inc()
            self._adapter_tokens.labels(*labels).inc(output_tokens)
            if ttft_s is not None:
                self._adapter_ttft.labels(*labels).observe(ttft_s)

    def refused(self, status: int) -> None:
        self._refused.labels(str(status)).inc()

    def control_error(self, call: str) -> None:
        self._control_errors.labels(call).inc()

    def stale_snapshot(self) -> None:
        self._stale.inc()

    def snapshot(self, *, epoch: int, version: int) -> None:
        self._epoch.set(epoch)
        self._version.set(version)

    def ready(self, is_ready: bool) -> None:
        self._ready.set(is_ready)

    def queued(self, num_generations: int) -> None:
        self._queued.set(num_generations)

    def trace_recorder(self, *, sent: int, dropped: int, refused: int, buffered: int, failed_sends: int) -> None:
        """Totals of this process's recorder, which only grow but for ``buffered``."""
        totals = {"sent": sent, "dropped": dropped, "refused": refused, "failed_sends": failed_sends}
        for name, total in totals.items():
            series = self._trace_failed_sends if name == "failed_sends" else self._trace_rows.labels(name)
            series.inc(total - self._trace_totals.get(name, 0))
        self._trace_totals = totals
        self._trace_buffered.set(buffered)

    def trace_store(self, status: TraceStoreStatus) -> None:
        self._trace_store.labels("written").set(status.written_rows)
        self._trace_store.labels("buffered").set(status.buffered_rows)
        self._trace_store.labels("dropped").set(status.dropped_rows)

    def render(self, *, per_tenant: bool) -> bytes:
        """As ``exposition.render``."""
        return render(self._registry, per_tenant=per_tenant)

    def _forget_adapter(self, name: _AdapterName) -> None:
        self._adapter_requests.remove_by_labels({"tenant": name[0], "adapter": name[1]})
        self._adapter_tokens.remove(*name)
        self._adapter_ttft.remove_by_labels({"tenant": name[0], "adapter": name[1]})


def _outcome(status: int) -> str:
    if status < 400:
        return "ok"
    if status == 429:
        return "limited"
    if status == 499:
        return "client_gone"
    return "client_error" if status < 500 else "failed"
