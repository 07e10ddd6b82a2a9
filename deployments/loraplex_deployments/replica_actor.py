"""A replica as a plain Ray actor: pins one copy of a base model, runs its engine, and serves the token stream.

Started in its placement group by the actuator. Requests and tokens never pass through Ray: gateways connect to the
stream server whose address ``ready`` returns.
"""

import asyncio

import msgspec
import ray
from loraplex.config.platform import BaseModelConfig, PlatformConfig
from loraplex.core.fleet import ReplicaTarget
from loraplex.core.ids import Digest
from loraplex.core.plan import Shape
from loraplex.core.step import Executor
from loraplex.model_runner.build import build_executor, load_model_spec
from loraplex.registry.cache import NodeCache
from loraplex.replica.engine_loop import EngineLoop
from loraplex.replica.server import ReplicaServer
from loraplex.telemetry.logs import configure_logging

from loraplex_deployments.base_models import model_source
from loraplex_deployments.control_client import RayArtifactReader, controller_handle
from loraplex_deployments.epoch_register import superseded


@ray.remote(max_restarts=0)
class ReplicaActor:
    """Dies with its engine; the controller starts the next one. What changes it names the epoch of the controller and
    raises Unavailable, ``superseded``, when this replica has heard from a later one."""

    def __init__(
        self, target: ReplicaTarget, base: BaseModelConfig, config: PlatformConfig, cluster_secret: str, epoch: int
    ) -> None:
        configure_logging()
        self._target = target
        self._epoch = epoch
        self._base = base
        self._config = config
        self._cluster_secret = cluster_secret
        self._loop: EngineLoop | None = None
        self._server: ReplicaServer | None = None
        self._address = ""
        self._starting = asyncio.Lock()
        self._loaded = asyncio.Event()

    def num_unfinished(self) -> int:
        """Requests that run or wait here."""
        return 0 if self._loop is None else self._loop.num_unfinished

    def hear(self, epoch: int) -> None:
        """Of a controller that is about to do something with it."""
        if epoch < self._epoch:
            raise superseded(epoch, self._epoch)
        self._epoch = epoch

    async def ready(self, epoch: int) -> str:
        """Loads the base if that has not happened yet; returns host:port of the stream server."""
        self.hear(epoch)
        async with self._starting:
            if self._server is None:
                self._loop = await asyncio.to_thread(self._build_loop)
                self._loaded.set()
                self._server = ReplicaServer(
                    self._loop, config=self._config.replica, cluster_secret=self._cluster_secret
                )
                host = ray.util.get_node_ip_address()
                port = await self._server.start(host)
                self._address = f"{host}:{port}"
        return self._address

    async def assign(self, digests: tuple[Digest, ...], epoch: int) -> None:
        """Makes these adapters resident as far as there is room; one that cannot be read is told to its requests."""
        self.hear(epoch)
        assert self._loop is not None, "it is not ready"
        await asyncio.wrap_future(self._loop.warm(digests))

    def _build_loop(self) -> EngineLoop:
        executor = _executor(self._base, self._target.shape, model_source(self._config, self._base))
        source = NodeCache(
            self._config.registry, directory=self._config.root / "cache", reader=RayArtifactReader(controller_handle())
        )
        loop = EngineLoop(
            replica_id=self._target.replica_id,
            executor=executor,
            engine_config=self._base.engine,
            source=source,
            config=self._config.replica,
        )
        loop.start()
        return loop

    async def wait_stopped(self) -> None:
        """Returns when the engine thread has ended, which it does only when it is broken or told to."""
        await self._loaded.wait()
        assert self._loop is not None
        await asyncio.to_thread(self._loop.join)


def _executor(base: BaseModelConfig, shape: Shape, model: str) -> Executor:
    if base.paced is None:
        # The bundle reserves the CPUs, so Ray does not tell torch of them.
        num_threads = base.executor.num_threads or max(1, int(base.num_cpus))
        config = msgspec.structs.replace(base.executor, num_threads=num_threads)
        return build_executor(config, model=model, base_model_id=base.base_model_id)
    # Only here: no replica that computes needs the cost model and numba.
    from loraplex.testing.paced_executor import build_paced_executor

    return build_paced_executor(
        msgspec.structs.replace(base.paced, tp=shape.tp, pp=shape.pp),
        model=load_model_spec(model, base.base_model_id),
        engine=base.engine,
        num_pages=base.executor.num_pages,
    )
