"""What one generation costs and leaves behind: its arrival told, quota settled, one trace row, metrics. Exactly once,
whatever its end.

Opened by the service once the tenant that pays is known; closed by ``Generation`` or, when that never starts, by the
service.
"""

import logging
from typing import Protocol

from loraplex.core.clock import Clock
from loraplex.core.ids import ReplicaId, TenantName
from loraplex.gateway.call import CallInfo, GenerateCall
from loraplex.gateway.directory import ResolvedModel
from loraplex.gateway.status import HTTP_CLIENT_GONE, HTTP_OK
from loraplex.telemetry.metrics import GatewayMetrics
from loraplex.telemetry.tracing import NO_SPAN, Tracing
from loraplex.tenancy.quota_gate import QuotaGate, Reservation
from loraplex.traces.recorder import RecorderCounters
from loraplex.traces.row import ArrivalRow, TraceRow

logger = logging.getLogger(__name__)


class Tracer(Protocol):
    """``loraplex.traces.TraceRecorder`` is one."""

    @property
    def counters(self) -> RecorderCounters: ...

    def arrived(self, row: ArrivalRow) -> None: ...

    def record(self, row: TraceRow) -> None: ...


class Account:
    """One client request, from its admission to its end."""

    def __init__(
        self,
        *,
        call: GenerateCall,
        info: CallInfo,
        tenant: TenantName,
        quota: QuotaGate,
        metrics: GatewayMetrics,
        tracer: Tracer,
        tracing: Tracing,
        clock: Clock,
    ) -> None:
        self._call = call
        self._info = info
        self._tenant = tenant
        self._quota = quota
        self._metrics = metrics
        self._tracer = tracer
        self._clock = clock
        self._reservation: Reservation | None = None
        self._first_token_s: float | None = None
        self._closed = False
        self._prompt_tokens = 0
        self.model: ResolvedModel | None = None
        """Set by the service when the name is resolved; None in the row of a call that asked for an unknown one."""
        self.span = tracing.begin(call.endpoint, caller=info.traceparent, start_s=info.arrival_s)
        self.span.set(request_id=info.request_id, tenant=tenant, endpoint=call.endpoint, priority=call.priority.value)
        metrics.started()

    def reserve(self, *, prompt_tokens: int, output_tokens: int) -> None:
        """Lets the request in, for ``model``: from now on it is load, whatever becomes of it. Raises RateLimited."""
        assert self.model is not None
        now_s = self._clock.monotonic_s()
        self._reservation = self._quota.reserve(self._tenant, prompt_tokens + output_tokens, now_s)
        self._prompt_tokens = prompt_tokens
        self._tracer.arrived(
            ArrivalRow(
                arrival_s=self._info.arrival_s,
                tenant=self._tenant,
                request_id=self._info.request_id,
                base_model_id=self.model.base.base_model_id,
                adapter_name=None if self.model.adapter is None else self.model.adapter.ref.name,
                prompt_tokens=prompt_tokens,
            )
        )

    def first_token(self) -> None:
        if self._first_token_s is None:
            self._first_token_s = self._clock.monotonic_s()
            self.span.event("first token")

    def close(
        self,
        *,
        status: int,
        finish_reason: str | None = None,
        output_tokens: int = 0,
        cached_tokens: int = 0,
        replica_id: ReplicaId | None = None,
    ) -> None:
        """Only the first call counts."""
        if self._closed:
            return
        self._closed = True
        now_s = self._clock.monotonic_s()
        prompt_tokens = 0
        if self._reservation is not None:
            # A request that generated nothing because we refused or failed it is not charged for its prompt.
            if output_tokens or status in (HTTP_OK, HTTP_CLIENT_GONE):
                prompt_tokens = self._prompt_tokens
            self._quota.settle(self._reservation, prompt_tokens + output_tokens, now_s, prompt_tokens=prompt_tokens)
        start_s = self._info.arrival_monotonic_s
        e2e_s = now_s - start_s
        ttft_s = tpot_s = None
        if self._first_token_s is not None:
            ttft_s = self._first_token_s - start_s
            if output_tokens > 1:
                tpot_s = (e2e_s - ttft_s) / (output_tokens - 1)
        adapter = None if self.model is None else self.model.adapter
        self._metrics.finished(
            endpoint=self._call.endpoint,
            tenant=self._tenant,
            adapter=None if adapter is None else adapter.ref.name,
            status=status,
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            output_tokens=output_tokens,
            ttft_s=ttft_s,
            tpot_s=tpot_s,
            e2e_s=e2e_s,
            now_s=now_s,
        )
        self._end_span(status, finish_reason, output_tokens, cached_tokens, replica_id)
        logger.info(
            "%s ended: %d",
            self._call.endpoint,
            status,
            extra={
                "tenant": self._tenant,
                "base_model": None if self.model is None else self.model.base.base_model_id,
                "adapter": None if adapter is None else adapter.ref.name,
                "replica": replica_id,
                "prompt_tokens": self._prompt_tokens,
                "output_tokens": output_tokens,
                "ttft_s": ttft_s,
                "e2e_s": e2e_s,
            },
        )
        self._tracer.record(
            TraceRow(
                arrival_s=self._info.arrival_s,
                tenant=self._tenant,
                request_id=self._info.request_id,
                endpoint=self._call.endpoint,
                base_model_id=None if self.model is None else self.model.base.base_model_id,
                adapter_name=None if adapter is None else adapter.ref.name,
                adapter_version=None if adapter is None else adapter.ref.version,
                adapter_digest=None if adapter is None else adapter.ref.digest,
                prompt_tokens=self._prompt_tokens,
                cached_tokens=cached_tokens,
                output_tokens=output_tokens,
                ttft_s=ttft_s,
                e2e_s=e2e_s,
                tpot_s=tpot_s,
                status=status,
                finish_reason=finish_reason,
                replica_id=replica_id,
                priority=self._call.priority.value,
                stream=self._call.stream,
            )
        )

    def _end_span(
        self,
        status: int,
        finish_reason: str | None,
        output_tokens: int,
        cached_tokens: int,
        replica_id: ReplicaId | None,
    ) -> None:
        if self.span is NO_SPAN:
            return
        self.span.set(
            status=status,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=cached_tokens,
            output_tokens=output_tokens,
        )
        if finish_reason is not None:
            self.span.set(finish_reason=finish_reason)
        if replica_id is not None:
            self.span.set(replica=replica_id)
        if self.model is not None:
            self.span.set(base_model=self.model.base.base_model_id)
            if self.model.adapter is not None:
                ref = self.model.adapter.ref
                self.span.set(adapter=ref.digest, adapter_name=ref.name)
        self.span.end(error=str(status) if status >= 500 else None)
