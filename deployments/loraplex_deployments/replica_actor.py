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
from loraplex.model_runner.config import ExecutorConfig
from loraplex.replica.engine_loop import EngineLoop
from loraplex.replica.server import ReplicaServer
from loraplex.telemetry.logs import configure_logging
from loraplex.telemetry.tracing import open_tracing
from ray.util.placement_group import get_current_placement_group

from loraplex_deployments.base_models import model_source
from loraplex_deployments.epoch_register import superseded
from loraplex_deployments.rank_actors import RayRankLauncher, node_cache


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
            executor=self._build_executor(),
            engine_config=self._base.engine,
            source=node_cache(self._config),
            config=self._config.replica,
            tracing=self._tracing,
        )
        loop.start()
        return loop

    async def wait_stopped(self) -> None:
        """Returns when the engine thread has ended, which it does only when it is broken or told to."""
        await self._loaded.wait()
        assert self._loop is not None
        await asyncio.to_thread(self._loop.join)

    def _build_executor(self) -> Executor:
        base, shape = self._base, self._target.shape
        model = model_source(self._config, base)
        if base.paced is not None:
            return _paced_executor(base, shape, model)
        launcher = None
        if shape.num_ranks > 1:
            group = get_current_placement_group()
            assert group is not None, "the actuator starts replicas in their group"
            launcher = RayRankLauncher(group, base, self._config, num_gpus=self._num_gpus)
        return build_executor(
            _executor_config(base, shape), model=model, base_model_id=base.base_model_id, launcher=launcher
        )


def _executor_config(base: BaseModelConfig, shape: Shape) -> ExecutorConfig:
    """The config's, in the shape of the plan. A cut into stages holds for as many stages as it has."""
    config = base.executor
    return msgspec.structs.replace(
        config,
        # Each rank's bundle reserves the CPUs, so Ray does not tell torch of them.
        num_threads=config.num_threads or max(1, int(base.num_cpus)),
        tp=shape.tp,
        pp=shape.pp,
        stage_layers=config.stage_layers if config.pp == shape.pp else None,
    )


def _paced_executor(base: BaseModelConfig, shape: Shape, model: str) -> Executor:
    assert base.paced is not None, "it computes"
    # Only here: no replica that computes needs the cost model and numba.
    from loraplex.testing.paced_executor import build_paced_executor

    return build_paced_executor(
        msgspec.structs.replace(base.paced, tp=shape.tp, pp=shape.pp),
        model=load_model_spec(model, base.base_model_id),
        engine=base.engine,
        num_pages=base.executor.num_pages,
    )
