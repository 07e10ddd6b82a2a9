"""The gateway process as one object: both fronts, the snapshot it works from, its quota lease.

Runs in Ray Serve's replica (``loraplex_deployments``), in benchmarks and in tests; knows none of them. Keeps serving
from its last snapshot while the controller is away.
"""

import asyncio
import inspect
import logging
import random
from collections.abc import Awaitable, Callable

from loraplex.core.clock import Clock, SystemClock
from loraplex.core.control import ControlPlane, ControlSnapshot, ReplicaRoute
from loraplex.core.errors import LoraplexError
from loraplex.core.generation import Dispatcher
from loraplex.core.ids import BaseModelId, GatewayId
from loraplex.gateway.accounting import Tracer
from loraplex.gateway.activity import Activity
from loraplex.gateway.adapter_service import AdapterService
from loraplex.gateway.cluster_view import ClusterView
from loraplex.gateway.config import GatewayConfig
from loraplex.gateway.grpc_api import LoraplexServicer
from loraplex.gateway.http_app import build_http_app
from loraplex.gateway.observer import Observer
from loraplex.gateway.routes.edge import Edge
from loraplex.gateway.routes.system import ReplicaLoads
from loraplex.gateway.service import GatewayService
from loraplex.gateway.tokenizer import Codecs
from loraplex.telemetry.config import TelemetryConfig
from loraplex.telemetry.metrics import GatewayMetrics
from loraplex.telemetry.tracing import Tracing
from loraplex.tenancy.config import TenancyConfig
from loraplex.tenancy.quota_gate import QuotaGate

logger = logging.getLogger(__name__)

_LAST_REPORT_S = 5.0
"""How long a gateway that stops waits to be rid of its usage."""

OnRoutes = Callable[[tuple[ReplicaRoute, ...], str], Awaitable[None] | None]
"""Told the routes and the cluster secret whenever they change; ``Router.update`` is one."""


class Gateway:
    """``http_app`` is an ASGI application, ``grpc_servicer`` the implementation of ``loraplex.v1``."""

    def __init__(
        self,
        config: GatewayConfig,
        *,
        gateway_id: GatewayId,
        control: ControlPlane,
        dispatcher: Dispatcher,
        tracer: Tracer,
        tenancy: TenancyConfig | None = None,
        telemetry: TelemetryConfig | None = None,
        tracing: Tracing | None = None,
        on_routes: OnRoutes | None = None,
        loads: ReplicaLoads | None = None,
        num_queued: Callable[[], int] = lambda: 0,
        max_open_calls: int = 4096,
        clock: Clock | None = None,
    ) -> None:
        """``loads``: the last report of each connected replica; without it a route counts as a replica that is up.
        ``num_queued``: generations that ``dispatcher`` holds because no replica takes them yet. ``max_open_calls``:
        authenticated calls at the same time; more are refused as Overloaded.
        The caller starts and closes ``dispatcher`` and ``tracer``."""
        self._config = config
        self._gateway_id = gateway_id
        self._control = control
        self._on_routes = on_routes
        self._loads = loads
        self._clock = clock or SystemClock()
        activity = Activity(tracer, self._clock)
        self._view = ClusterView()
        self._codecs = Codecs()
        self._tenancy = tenancy or TenancyConfig()
        self._quota = QuotaGate(self._tenancy)
        self._warm: dict[BaseModelId, asyncio.Task[None]] = {}
        self._routes: tuple[tuple[ReplicaRoute, ...], str] | None = None
        self._leased = False
        self._loops: list[asyncio.Task[None]] = []
        telemetry = telemetry or TelemetryConfig()
        self.metrics = GatewayMetrics(telemetry)
        self._observer = Observer(
            self.metrics,
            control=control,
            view=self._view,
            tracer=tracer,
            loads=loads,
            num_queued=num_queued,
            not_ready=self.not_ready,
            fleet_poll_s=telemetry.fleet_poll_s,
        )
        service = GatewayService(
            config,
            view=self._view,
            codecs=self._codecs,
            quota=self._quota,
            dispatcher=dispatcher,
            tracer=activity,
            metrics=self.metrics,
            tracing=tracing or Tracing(),
            clock=self._clock,
            max_open_calls=max_open_calls,
        )
        adapters = AdapterService(config, view=self._view, control=control)
        self.http_app: Edge = build_http_app(
            service,
            adapters,
            control,
            gateway_id=gateway_id,
            loads=loads,
            activity=activity,
            num_queued=num_queued,
            not_ready=self.not_ready,
            observe=self._observer.observe,
        )
        self.grpc_servicer = LoraplexServicer(service, adapters)

    async def start(self, *, wait_s: float = 10.0) -> None:
        """Begins to follow the controller; returns once the gateway has a snapshot and a quota lease, or after
        ``wait_s`` without them: it goes on trying."""
        loops = (self._follow(), self._lease(), self._report(), self._observer.watch_fleet())
        self._loops = [asyncio.create_task(loop) for loop in loops]
        await self._view.wait_for(lambda _directory: self._leased, timeout_s=wait_s)

    async def stop(self) -> None:
        """Ends the loops and reports what usage is left."""
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, *self._warm.values(), return_exceptions=True)
        self._loops = []
        try:
            async with asyncio.timeout(_LAST_REPORT_S):
                await self._report_usage()
        except (LoraplexError, TimeoutError) as error:
            logger.warning("the last usage could not be reported: %s", error)

    def not_ready(self) -> str | None:
        """Why the gateway cannot serve now; None when it can."""
        snapshot = self._view.snapshot
        if snapshot is None:
            return "No snapshot of the cluster yet."
        if not self._leased:
            return "No quota lease yet."
        if any(not task.done() for task in self._warm.values()):
            return "Tokenizers are being loaded."
        num_replicas = len(snapshot.routes) if self._loads is None else len(self._loads())
        return None if num_replicas or snapshot.asleep else "No replica is up."

    async def _follow(self) -> None:
        """Long-polls snapshots for ever."""
        backoff = _Backoff(self._config)
        while True:
            held = self._view.snapshot
            try:
                snapshot = await self._control.snapshot(
                    after_epoch=-1 if held is None else held.epoch,
                    after_version=-1 if held is None else held.version,
                    timeout_s=self._config.snapshot_poll_s,
                )
                if snapshot is not None and not await self._take(snapshot):
                    await asyncio.sleep(backoff.next_s())
                    continue
                backoff.reset()
            except Exception as error:  # whatever the carrier raises, the gateway must go on
                self._controller_failed("snapshot", error)
                await asyncio.sleep(backoff.next_s())

    async def _take(self, snapshot: ControlSnapshot) -> bool:
        held = self._view.snapshot
        if held is not None and snapshot.epoch < held.epoch:
            self.metrics.stale_snapshot()
            logger.warning("refused a snapshot of epoch %d; this gateway is at %d", snapshot.epoch, held.epoch)
            return False
        # Limits first: a tenant that the directory knows must be known to the quota gate.
        self._quota.update_limits(snapshot.tenants, self._clock.monotonic_s())
        if not self._view.apply(snapshot):
            return False
        self.metrics.snapshot(epoch=snapshot.epoch, version=snapshot.version)
        for base in snapshot.base_models:
            if base.base_model_id not in self._warm:
                self._warm[base.base_model_id] = asyncio.create_task(self._load_codec(snapshot, base.base_model_id))
        routes = (snapshot.routes, snapshot.cluster_secret)
        if routes != self._routes and self._on_routes is not None:
            answer = self._on_routes(*routes)
            if inspect.isawaitable(answer):
                await answer
        self._routes = routes
        return True

    async def _load_codec(self, snapshot: ControlSnapshot, base_model_id: BaseModelId) -> None:
        base = next(base for base in snapshot.base_models if base.base_model_id == base_model_id)
        try:
            await self._codecs.get(base)
        except Exception:
            # Requests for this base fail with the same error and try again; the others go on.
            logger.exception("the tokenizer of base %s cannot be loaded", base_model_id)

    async def _lease(self) -> None:
        """Exchanges demand for quota shares, each slice for ever."""
        await self._view.wait_for(lambda _directory: True, timeout_s=None)
        while True:
            try:
                shares = await self._control.lease_quota(self._gateway_id, self._quota.take_demand(), self._quota.held)
                self._quota.update_shares(shares, self._clock.monotonic_s())
                if not self._leased:
                    self._leased = True
                    self._view.notify()
            except Exception as error:  # as above
                self._controller_failed("lease_quota", error)
            await asyncio.sleep(self._tenancy.slice_s)

    async def _report(self) -> None:
        """Reports usage each slice for ever. Apart from the lease: the controller has to write it to its database,
        which may be slow or away, and a gateway that is not heard for long loses its shares."""
        while True:
            await asyncio.sleep(self._tenancy.slice_s)
            try:
                await self._report_usage()
            except Exception as error:  # as above
                self._controller_failed("report_usage", error)

    async def _report_usage(self) -> None:
        rows = self._quota.take_usage()
        if not rows:
            return
        try:
            await self._control.report_usage(self._gateway_id, rows)
        except BaseException:
            self._quota.return_usage(rows)
            raise

    def _controller_failed(self, call: str, error: Exception) -> None:
        self.metrics.control_error(call)
        if isinstance(error, LoraplexError):
            logger.warning("controller call %s failed: %s", call, error.message)
        else:
            logger.error("controller call %s failed", call, exc_info=error)


class _Backoff:
    """Doubling pauses with jitter."""

    def __init__(self, config: GatewayConfig) -> None:
        self._min_s = config.retry_min_s
        self._max_s = config.retry_max_s
        self._step_s = self._min_s

    def next_s(self) -> float:
        step_s = self._step_s
        self._step_s = min(self._max_s, step_s * 2)
        return step_s * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        self._step_s = self._min_s
