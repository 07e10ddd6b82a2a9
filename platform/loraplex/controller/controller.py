"""The controller in-process: ``core.control.ControlPlane`` over the control database, the registry and the share book.

Wires its parts together and decides nothing itself. The deployment creates it in an event loop, tells it of base models
and replicas, and passes calls on. Gateways and replicas go on with what they have while it is away; a second controller
on the same database replaces this one, whose writes then fail as Unavailable.
"""

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from loraplex.controller.adapter_desk import AdapterDesk
from loraplex.controller.catalog import CatalogView
from loraplex.controller.catalog_thread import CatalogThread
from loraplex.controller.config import ControllerOptions
from loraplex.controller.fleet.autopilot import Autopilot
from loraplex.controller.fleet.drains import Loads
from loraplex.controller.fleet.manager import FleetManager
from loraplex.controller.fleet.meter import TrafficMeter
from loraplex.controller.fleet.state import FleetBase
from loraplex.controller.fleet.store import FleetStore, Reason
from loraplex.controller.snapshot_board import SnapshotBoard
from loraplex.core.clock import Clock, SystemClock
from loraplex.core.control import (
    AdapterView,
    ArtifactInfo,
    BaseModelView,
    ControlSnapshot,
    NewKey,
    QuotaShare,
    ReplicaRoute,
    TenantDemand,
    TraceStoreStatus,
)
from loraplex.core.errors import LoraplexError, Unavailable
from loraplex.core.fleet import Actuator
from loraplex.core.ids import BaseModelId, Digest, GatewayId, ReplicaId, TenantName
from loraplex.core.model import ModelSpec
from loraplex.core.plan import Plan
from loraplex.core.rollout import DecisionRecord, FleetStatus, PlanRecord
from loraplex.core.tenant import KeyView, Role, TenantLimits, TenantView, UsageRow
from loraplex.tenancy.share_book import ShareBook

logger = logging.getLogger(__name__)


class TraceSink(Protocol):
    """``loraplex.traces`` has one."""

    def append(self, batch: bytes) -> None:
        """``batch``: one Arrow IPC stream. Blocking; called from one thread, in order of arrival."""

    def unwritten(self, since_s: float) -> bytes:
        """Requests that arrived from ``since_s`` (Unix) on and that the files do not hold yet, as an IPC stream."""

    def status(self) -> TraceStoreStatus: ...


class Controller:
    """``await start()`` before any other call, ``await stop()`` at the end; all in one event loop."""

    def __init__(self, options: ControllerOptions, *, trace_sink: TraceSink, clock: Clock | None = None) -> None:
        """Raises BadConfig."""
        self._options = options
        self._clock = clock or SystemClock()
        self._trace_sink = trace_sink
        self._shares = ShareBook(options.tenancy)
        self._trace_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="traces")
        self._io_threads = ThreadPoolExecutor(options.controller.num_io_threads, thread_name_prefix="artifacts")
        self._catalog = CatalogThread(options, self._clock, self._show)
        self._adapters = AdapterDesk(
            options.registry,
            data_dir=options.data_dir,
            catalog=self._catalog,
            io_threads=self._io_threads,
            clock=self._clock,
        )
        self._sweeper: asyncio.Task[None] | None = None
        self._fleet: FleetManager | None = None
        self._fleet_tasks: tuple[asyncio.Task[None], ...] = ()
        planning = options.controller.fleet.planning
        self._meter = TrafficMeter(
            self._clock, ttft_s=planning.ttft_s, tpot_s=planning.tpot_s, window_s=planning.window_s
        )

    async def start(self) -> None:
        """Takes the next epoch. Raises BadConfig, StorageFull, Unavailable; nothing stays open then."""
        try:
            catalog, view = await self._catalog.open()
            self._board = SnapshotBoard(epoch=catalog.epoch, cluster_secret=catalog.cluster_secret, catalog=view)
            await self._adapters.open()
        except BaseException:
            await self._release()
            raise
        self._sweeper = asyncio.create_task(self._sweep_forever())

    async def stop(self) -> None:
        """Finishes what was begun, then closes the database. Replicas go on, and the trace sink stays the caller's.
        Idempotent."""
        for task in self._fleet_tasks:
            task.cancel()
        await asyncio.gather(*self._fleet_tasks, return_exceptions=True)
        if self._fleet is not None:
            await self._fleet.stop()
        if self._sweeper is not None:
            self._sweeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sweeper
            self._sweeper = None
            await self._adapters.close()
        await self._release()

    @property
    def cluster_secret(self) -> str:
        return self._board.current.cluster_secret

    @property
    def epoch(self) -> int:
        return self._board.current.epoch

    async def set_base_models(self, views: tuple[BaseModelView, ...], specs: Mapping[BaseModelId, ModelSpec]) -> None:
        """What is served from now on. ``specs`` must hold every view's id: adapters are checked against them."""
        self._adapters.set_bases({view.base_model_id: specs[view.base_model_id] for view in views})
        self._board.set_base_models(views)

    async def run_fleet(
        self,
        actuator: Actuator,
        *,
        loads: Loads,
        bases: Mapping[BaseModelId, FleetBase],
        default_plan: Plan,
    ) -> FleetManager:
        """Brings the machines to the plan in force and keeps them there, until ``stop``. Returns once the routes of the
        last controller are in the snapshot: call it before anybody asks for one, at most once.

        ``bases``: of the config, with what a rank of each needs. ``default_plan``: of the config, in force while none
        was applied. ``loads``: requests that run or wait on a replica. Raises StorageFull, Unavailable.
        """
        store = FleetStore(self._catalog, self._clock, epoch=self.epoch)
        manager = FleetManager(
            actuator,
            store,
            publish=self._board.set_routes,
            loads=loads,
            adapters=lambda: self._board.adapter_keys,
            bases=bases,
            default_plan=default_plan,
            config=self._options.controller.fleet,
            clock=self._clock,
        )
        await manager.recover()
        autopilot = Autopilot(
            manager,
            store,
            self._meter,
            config=self._options.controller.fleet,
            trace_url=lambda: self._trace_sink.status().url,
            unwritten=lambda since_s: self._trace_sink.unwritten(since_s),
            lora_ranks=lambda: self._board.lora_ranks,
            bases=tuple(bases),
            clock=self._clock,
        )
        self._fleet = manager
        self._fleet_tasks = (asyncio.create_task(manager.run()), asyncio.create_task(autopilot.run()))
        return manager

    async def set_route(self, route: ReplicaRoute) -> None:
        self._board.set_route(route)

    async def remove_route(self, replica_id: ReplicaId) -> None:
        """Idempotent."""
        self._board.remove_route(replica_id)

    async def ensure_tenant(self, name: str, limits: TenantLimits) -> TenantView:
        """Creates the tenant unless it exists; one that exists keeps its limits."""
        return await self._catalog.change(lambda catalog: catalog.ensure_tenant(name, limits))

    async def ensure_key(self, tenant: TenantName, role: Role, key: str) -> KeyView:
        """Stores a key that the caller chose, unless the tenant has it. Raises InvalidInput, NotFound, Conflict."""
        return await self._catalog.change(lambda catalog: catalog.ensure_key(tenant, role, key))

    async def ensure_adapter(self, tenant: TenantName, name: str, directory: str) -> AdapterView:
        """Registers a PEFT directory of this machine unless the name exists, in whatever version."""
        current = await self._catalog.read(lambda catalog: catalog.current_adapter(tenant, name))
        if current is not None:
            return current
        return await self._adapters.register_directory(tenant, name, Path(directory))

    async def snapshot(self, *, after_epoch: int, after_version: int, timeout_s: float) -> ControlSnapshot | None:
        limit_s = min(max(timeout_s, 0.0), self._options.controller.max_long_poll_s)
        return await self._board.newer_than(after_epoch, after_version, timeout_s=limit_s)

    async def lease_quota(
        self, gateway_id: GatewayId, demand: tuple[TenantDemand, ...], held: tuple[QuotaShare, ...]
    ) -> tuple[QuotaShare, ...]:
        """The row of ``tenancy.share_book.OTHER_TENANTS`` stands for all tenants that are not named."""
        return self._shares.lease(gateway_id, demand, self._board.limits, self._clock.monotonic_s(), held)

    async def report_usage(self, gateway_id: GatewayId, rows: tuple[UsageRow, ...]) -> None:
        if rows:
            await self._catalog.read(lambda catalog: catalog.add_usage(rows))

    async def record_traces(self, gateway_id: GatewayId, batch: bytes) -> TraceStoreStatus:
        return await asyncio.get_running_loop().run_in_executor(self._trace_thread, self._append_traces, batch)

    async def artifact(self, digest: Digest) -> ArtifactInfo:
        return await self._adapters.artifact(digest)

    async def read_artifact(self, digest: Digest, *, offset: int, max_bytes: int) -> bytes:
        return await self._adapters.read_artifact(digest, offset=offset, max_bytes=max_bytes)

    async def begin_upload(self, tenant: TenantName, name: str) -> str:
        return await self._adapters.begin(tenant, name)

    async def append_upload(self, upload_id: str, filename: str, data: bytes) -> None:
        await self._adapters.append(upload_id, filename, data)

    async def commit_upload(self, upload_id: str) -> AdapterView:
        return await self._adapters.commit(upload_id)

    async def abort_upload(self, upload_id: str) -> None:
        await self._adapters.abort(upload_id)

    async def register_url(self, tenant: TenantName, name: str, url: str) -> AdapterView:
        return await self._adapters.register_url(tenant, name, url)

    async def set_current(self, tenant: TenantName, name: str, version: int) -> AdapterView:
        return await self._catalog.change(lambda catalog: catalog.set_current(tenant, name, version))

    async def delete_adapter(self, tenant: TenantName, name: str, version: int | None) -> None:
        await self._catalog.change(lambda catalog: catalog.delete_adapter(tenant, name, version))

    async def create_tenant(self, name: str, limits: TenantLimits) -> TenantView:
        return await self._catalog.change(lambda catalog: catalog.create_tenant(name, limits))

    async def update_tenant(self, name: TenantName, limits: TenantLimits) -> TenantView:
        return await self._catalog.change(lambda catalog: catalog.update_tenant(name, limits))

    async def delete_tenant(self, name: TenantName) -> None:
        await self._catalog.change(lambda catalog: catalog.delete_tenant(name))
        await self._adapters.abort_tenant(name)

    async def create_key(self, tenant: TenantName, role: Role) -> NewKey:
        return await self._catalog.change(lambda catalog: catalog.create_key(tenant, role))

    async def delete_key(self, tenant: TenantName, key_id: str) -> None:
        await self._catalog.change(lambda catalog: catalog.delete_key(tenant, key_id))

    async def usage(self, tenant: TenantName) -> UsageRow:
        return await self._catalog.read(lambda catalog: catalog.usage(tenant))

    async def apply_plan(self, plan: Plan, *, renumber: bool) -> PlanRecord:
        reason = Reason(text="an administrator applied it")
        return await self._running_fleet.plans.apply(plan, source="admin", reason=reason, renumber=renumber)

    async def accept_plan(self, version: int) -> PlanRecord:
        return await self._running_fleet.plans.accept(version)

    async def rollback_plan(self, version: int | None) -> PlanRecord:
        return await self._running_fleet.plans.rollback(version)

    async def plan_record(self, version: int | None) -> PlanRecord:
        return await self._running_fleet.plans.record(version)

    async def plan_history(self, limit: int) -> tuple[PlanRecord, ...]:
        return await self._running_fleet.plans.history(limit)

    async def decisions(self, limit: int) -> tuple[DecisionRecord, ...]:
        return await self._running_fleet.plans.decisions(limit)

    async def fleet_status(self) -> FleetStatus:
        window_s = self._options.controller.fleet.planning.window_s
        return replace(self._running_fleet.status(), attainment=self._meter.attainment(window_s))

    async def wake_base(self, base_model_id: BaseModelId) -> None:
        await self._running_fleet.plans.wake_base(base_model_id)

    @property
    def _running_fleet(self) -> FleetManager:
        if self._fleet is None:
            raise Unavailable("this controller runs no replicas")
        return self._fleet

    def _append_traces(self, batch: bytes) -> TraceStoreStatus:
        self._trace_sink.append(batch)
        self._meter.add(batch)
        return self._trace_sink.status()

    def _show(self, view: CatalogView) -> None:
        self._board.set_catalog(view)

    async def _sweep_forever(self) -> None:
        while True:
            await asyncio.sleep(self._options.registry.sweep_interval_s)
            try:
                await self._adapters.sweep()
            except LoraplexError as error:
                logger.warning("sweeping deleted adapters failed, will be tried again: %s", error)

    async def _release(self) -> None:
        await self._catalog.close()
        self._io_threads.shutdown(wait=False)
        self._trace_thread.shutdown(wait=False)
