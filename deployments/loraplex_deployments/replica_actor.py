"""A replica as a plain Ray actor: pins one copy of a base model, runs its engine, and serves the token stream.

Started in its placement group by the actuator. Requests and tokens never pass through Ray: gateways connect to the
stream server whose address ``ready`` returns.
"""

import asyncio

import ray
from loraplex.config.platform import BaseModelConfig, PlatformConfig
from loraplex.core.collector import exempt_loaded
from loraplex.core.fleet import ReplicaTarget
from loraplex.core.ids import Digest
from loraplex.core.switching import switch_often
from loraplex.replica.engine_loop import EngineLoop
from loraplex.replica.server import ReplicaServer
from loraplex.telemetry.logs import configure_logging
from loraplex.telemetry.tracing import open_tracing

from loraplex_deployments.epoch_register import superseded
from loraplex_deployments.executors import executor_of
from loraplex_deployments.rank_actors import node_cache


@ray.remote(max_restarts=0)
class ReplicaActor:
    """Dies with its engine; the controller starts the next one. What changes it names the epoch of the controller and
    raises Unavailable, ``superseded``, when this replica has heard from a later one."""

    def __init__(
        self,
        target: ReplicaTarget,
        base: BaseModelConfig,
        config: PlatformConfig,
        cluster_secret: str,
        epoch: int,
        num_gpus: float,
    ) -> None:
        """``num_gpus``: what it takes of its bundle's GPU, and each of its ranks of theirs."""
        switch_often()
        configure_logging(config.telemetry.logs)
        self._target = target
        self._epoch = epoch
        self._num_gpus = num_gpus
        self._base = base
        self._config = config
        self._cluster_secret = cluster_secret
        self._loop: EngineLoop | None = None
        self._server: ReplicaServer | None = None
        self._address = ""
        self._tracing = open_tracing(config.telemetry.tracing, service="replica", instance=target.replica_id)
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
        loop = EngineLoop(
            replica_id=self._target.replica_id,
            executor=executor_of(self._target, self._base, self._config, num_gpus=self._num_gpus),
            engine_config=self._base.engine,
            source=node_cache(self._config),
            config=self._config.replica,
            tracing=self._tracing,
        )
        exempt_loaded()
        loop.start()
        return loop

    async def wait_stopped(self) -> None:
        """Returns when the engine thread has ended, which it does only when it is broken or told to."""
        await self._loaded.wait()
        assert self._loop is not None
        await asyncio.to_thread(self._loop.join)
