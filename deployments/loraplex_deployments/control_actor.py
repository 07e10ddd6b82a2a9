"""The controller as a supervised Ray actor: the one process that opens the control database.

Wraps ``loraplex.controller.Controller`` for calls over Ray and keeps the replicas of the config running. Ray restarts
it when it dies; replicas and gateways go on meanwhile, and it adopts the replicas that it finds.
"""

import asyncio
import logging
from typing import Any

import ray
from loraplex.config.platform import PlatformConfig
from loraplex.controller.controller import Controller
from loraplex.core.ids import ReplicaId
from loraplex.telemetry.logs import configure_logging
from loraplex.traces.writer import TraceWriter
from ray.exceptions import RayTaskError

from loraplex_deployments.actuator import RayActuator, ReplicaSpec, remove_replica, remove_replicas, replica_specs
from loraplex_deployments.base_models import base_model_views

logger = logging.getLogger(__name__)

_RESTART_BACKOFF_S = (0.5, 1.0, 2.0, 5.0, 10.0)


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0, max_concurrency=1000)
class ControllerActor:
    def __init__(self, config: PlatformConfig) -> None:
        configure_logging()
        self._config = config
        self._traces = TraceWriter(config.traces, config.trace_url)
        self._controller: Controller | None = None
        self._starting = asyncio.Lock()
        self._supervisors: list[asyncio.Task[None]] = []
        self._failures: dict[ReplicaId, str] = {}

    async def start(self) -> None:
        """Opens the database, takes the next epoch and begins to bring replicas up. Idempotent."""
        async with self._starting:
            if self._controller is not None:
                return
            specs, views = await asyncio.to_thread(base_model_views, self._config)
            controller = Controller(self._config.controller_options(), trace_sink=self._traces)
            await controller.start()
            await controller.set_base_models(views, specs)
            self._controller = controller
            actuator = RayActuator(self._config, controller.cluster_secret)
            for spec in replica_specs(self._config):
                self._supervisors.append(asyncio.create_task(self._supervise(actuator, spec)))

    async def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One ControlPlane (or bootstrap) method of the Controller. Its LoraplexErrors travel as they are."""
        await self.start()
        assert self._controller is not None
        if method.startswith("_"):
            raise AttributeError(method)
        return await getattr(self._controller, method)(*args, **kwargs)

    def replica_failures(self) -> dict[ReplicaId, str]:
        """The last reason for each replica that is down now."""
        return dict(self._failures)

    async def stop(self) -> None:
        """Clean stop: replicas end, buffered trace rows are written, the database is closed. (A controller that dies
        leaves its replicas running, and the next one adopts them.)"""
        for task in self._supervisors:
            task.cancel()
        await asyncio.gather(*self._supervisors, return_exceptions=True)
        await asyncio.to_thread(remove_replicas, self._config)
        if self._controller is not None:
            await self._controller.stop()
        await asyncio.to_thread(self._traces.close)

    async def _supervise(self, actuator: RayActuator, spec: ReplicaSpec) -> None:
        assert self._controller is not None
        failures = 0
        while True:
            try:
                handle, route = await actuator.ensure(spec)
                await self._controller.set_route(route)
                self._failures.pop(spec.replica_id, None)
                failures = 0
                logger.info("replica %s is ready at %s", spec.replica_id, route.address)
                await handle.wait_stopped.remote()
                reason = "stopped"
            except Exception as error:  # whatever it was, the next attempt must come
                cause = error.cause if isinstance(error, RayTaskError) else error
                reason = (str(cause).strip() or type(cause).__name__).splitlines()[-1]
            self._failures[spec.replica_id] = reason
            logger.error("replica %s is down: %s", spec.replica_id, reason)
            await self._controller.remove_route(spec.replica_id)
            remove_replica(spec.replica_id)
            await asyncio.sleep(_RESTART_BACKOFF_S[min(failures, len(_RESTART_BACKOFF_S) - 1)])
            failures += 1
