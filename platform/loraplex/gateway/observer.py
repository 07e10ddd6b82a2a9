"""Brings up to date what the metrics tell of parts that do not count by themselves: replicas, queue, trace recorder,
and the controller's fleet, which is asked for it now and then.

Owned by ``Gateway``.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping

from loraplex.core.control import ControlPlane
from loraplex.core.errors import LoraplexError
from loraplex.core.ids import ReplicaId
from loraplex.core.wire import LoadReport
from loraplex.gateway.accounting import Tracer
from loraplex.gateway.cluster_view import ClusterView
from loraplex.telemetry.metrics import GatewayMetrics

logger = logging.getLogger(__name__)

_NUM_DECISIONS = 100


class Observer:
    def __init__(
        self,
        metrics: GatewayMetrics,
        *,
        control: ControlPlane,
        view: ClusterView,
        tracer: Tracer,
        loads: Callable[[], Mapping[ReplicaId, LoadReport]] | None,
        num_queued: Callable[[], int],
        not_ready: Callable[[], str | None],
        fleet_poll_s: float,
    ) -> None:
        self._metrics = metrics
        self._control = control
        self._view = view
        self._tracer = tracer
        self._loads = loads
        self._num_queued = num_queued
        self._not_ready = not_ready
        self._fleet_poll_s = fleet_poll_s

    def observe(self) -> None:
        """Called when somebody reads the metrics."""
        self._metrics.ready(self._not_ready() is None)
        self._metrics.queued(self._num_queued())
        if self._loads is not None:
            snapshot = self._view.snapshot
            self._metrics.replicas.replace(self._loads(), () if snapshot is None else snapshot.routes)
        rows = self._tracer.counters
        self._metrics.trace_recorder(
            sent=rows.sent,
            dropped=rows.dropped,
            refused=rows.refused,
            buffered=rows.buffered,
            failed_sends=rows.failed_sends,
        )

    async def watch_fleet(self) -> None:
        """Until it is cancelled."""
        while True:
            try:
                status = await self._control.fleet_status()
                self._metrics.fleet.replace(status, await self._control.decisions(_NUM_DECISIONS))
            except Exception as error:  # whatever the carrier raises, the gateway goes on
                self._metrics.fleet.unknown()
                self._metrics.control_error("fleet_status")
                if not isinstance(error, LoraplexError):
                    logger.error("the state of the fleet cannot be read", exc_info=error)
            await asyncio.sleep(self._fleet_poll_s)
