"""A replica as a plain Ray actor: pins one copy of a base model, runs its engine, and serves the token stream.

Started in its placement group by the actuator. Requests and tokens never pass through Ray: gateways connect to the
stream server whose address ``ready`` returns.
"""

import asyncio

import ray
from loraplex.config.platform import BaseModelConfig, PlatformConfig
from loraplex.core.ids import ReplicaId
from loraplex.core.step import Executor
from loraplex.model_runner.build import build_executor, load_model_spec
from loraplex.registry.cache import NodeCache
from loraplex.replica.engine_loop import EngineLoop
from loraplex.replica.server import ReplicaServer
from loraplex.telemetry.logs import configure_logging

from loraplex_deployments.base_models import model_source
from loraplex_deployments.control_client import RayArtifactReader, controller_handle


@ray.remote(max_restarts=0)
class ReplicaActor:
    """Dies with its engine; the controller's supervisor starts the next one."""

    def __init__(
        self, replica_id: ReplicaId, base: BaseModelConfig, config: PlatformConfig, cluster_secret: str
    ) -> None:
        configure_logging()
        self._replica_id = replica_id
        self._base = base
        self._config = config
        self._cluster_secret = cluster_secret
        self._loop: EngineLoop | None = None
        self._server: ReplicaServer | None = None
        self._address = ""
        self._starting = asyncio.Lock()

    async def ready(self) -> str:
        """Loads the base if that has not happened yet; returns host:port of the stream server."""
        async with self._starting:
            if self._server is None:
                self._loop = await asyncio.to_thread(self._build_loop)
                self._server = ReplicaServer(
                    self._loop, config=self._config.replica, cluster_secret=self._cluster_secret
                )
                host = ray.util.get_node_ip_address()
                port = await self._server.start(host)
                self._address = f"{host}:{port}"
        return self._address

    def _build_loop(self) -> EngineLoop:
        executor = _executor(self._base, model_source(self._config, self._base))
        source = NodeCache(
            self._config.registry, directory=self._config.root / "cache", reader=RayArtifactReader(controller_handle())
        )
        loop = EngineLoop(
            replica_id=self._replica_id,
            executor=executor,
            engine_config=self._base.engine,
            source=source,
            config=self._config.replica,
        )
        loop.start()
        return loop

    async def wait_stopped(self) -> None:
        """Returns when the engine thread has ended, which it does only when it is broken or told to."""
        assert self._loop is not None
        await asyncio.to_thread(self._loop.join)


def _executor(base: BaseModelConfig, model: str) -> Executor:
    if base.paced is None:
        return build_executor(base.executor, model=model, base_model_id=base.base_model_id)
    # Only here: no replica that computes needs the cost model and numba.
    from loraplex.testing.paced_executor import build_paced_executor

    return build_paced_executor(
        base.paced,
        model=load_model_spec(model, base.base_model_id),
        engine=base.engine,
        num_pages=base.executor.num_pages,
    )
