"""The controller as a Ray actor: the one process that opens the control database.

Wraps ``loraplex.controller.Controller`` for calls over Ray, and has it keep the replicas of its plan running through
the actuator. Ray restarts it when it dies; replicas and gateways go on meanwhile, and it adopts what it finds.
"""

import asyncio
import contextlib
from typing import Any

import ray
from loraplex.config.platform import PlatformConfig
from loraplex.controller.controller import Controller
from loraplex.controller.fleet.manager import FleetManager
from loraplex.core.control import AdapterView
from loraplex.core.control_wire import decode_request, encode_answer
from loraplex.core.ids import ReplicaId
from loraplex.telemetry.logs import configure_logging
from loraplex.traces.writer import TraceWriter

from loraplex_deployments.actuator import RayActuator, remove_all_replicas
from loraplex_deployments.base_models import base_model_views, default_plan, fleet_bases


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0, max_concurrency=1000)
class ControllerActor:
    def __init__(self, config: PlatformConfig) -> None:
        configure_logging(config.telemetry.logs)
        self._config = config
        self._traces: TraceWriter | None = None
        self._controller: Controller | None = None
        self._fleet: FleetManager | None = None
        self._starting = asyncio.Lock()

    async def start(self) -> None:
        """Opens traces and database, takes the next epoch and begins to bring replicas up. Idempotent; after a failure
        nothing of it stays, and the next call tries again. (What fails in the constructor ends the actor untold.)"""
        async with self._starting:
            if self._controller is not None:
                return
            specs, views = await asyncio.to_thread(base_model_views, self._config)
            async with contextlib.AsyncExitStack() as undo:
                traces = await asyncio.to_thread(TraceWriter, self._config.traces, self._config.trace_url)
                undo.push_async_callback(asyncio.to_thread, traces.close)
                controller = Controller(self._config.controller_options(), trace_sink=traces)
                await controller.start()
                undo.push_async_callback(controller.stop)
                await controller.set_base_models(views, specs)
                actuator = RayActuator(
                    self._config, cluster_secret=controller.cluster_secret, adapters=lambda: _adapters(controller)
                )
                self._fleet = await controller.run_fleet(
                    actuator,
                    loads=actuator.num_unfinished,
                    bases=fleet_bases(self._config, specs),
                    default_plan=default_plan(self._config),
                )
                undo.pop_all()
            self._controller, self._traces = controller, traces

    async def ask(self, request: bytes) -> bytes:
        """One ControlPlane method, as gateways and replicas ask, which may be of another version. Its LoraplexErrors
        travel as they are."""
        method, arguments = decode_request(request)
        return encode_answer(await self.call(method, (), arguments))

    async def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One ControlPlane or bootstrap method of the Controller, for processes of the same build."""
        await self.start()
        assert self._controller is not None
        if method.startswith("_"):
            raise AttributeError(method)
        return await getattr(self._controller, method)(*args, **kwargs)

    def replica_failures(self) -> dict[ReplicaId, str]:
        """The last reason for each kind of replica that is down now."""
        return {} if self._fleet is None else self._fleet.failures()

    async def leave(self) -> None:
        """Clean stop that leaves the replicas to a successor: trace rows are written, the database is closed."""
        if self._controller is not None:
            await self._controller.stop()
        if self._traces is not None:
            await asyncio.to_thread(self._traces.close)

    async def stop(self) -> None:
        """Clean stop: replicas end, buffered trace rows are written, the database is closed. (A controller that dies
        leaves its replicas running, and the next one adopts them.)"""
        secret = None if self._controller is None else self._controller.cluster_secret
        await self.leave()
        await asyncio.to_thread(remove_all_replicas, secret)


async def _adapters(controller: Controller) -> tuple[AdapterView, ...]:
    snapshot = await controller.snapshot(after_epoch=-1, after_version=-1, timeout_s=0)
    assert snapshot is not None, "there is always one newer than none"
    return snapshot.adapters
