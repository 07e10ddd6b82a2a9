"""A whole platform in this process: the real controller, gateway, router and stream server, and an engine whose
executor computes nothing."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from loraplex.controller.controller import Controller
from loraplex.controller.fleet.config import FleetConfig
from loraplex.core.adapter import AdapterManifest
from loraplex.core.control import ReplicaRoute
from loraplex.core.errors import Unavailable
from loraplex.core.fleet import NodeStatus, ReplicaTarget
from loraplex.core.ids import Digest, GatewayId
from loraplex.core.tenant import Role
from loraplex.engine import EngineConfig
from loraplex.gateway.config import GatewayConfig
from loraplex.gateway.gateway import Gateway
from loraplex.replica.config import ReplicaConfig
from loraplex.replica.engine_loop import EngineLoop
from loraplex.replica.server import ReplicaServer
from loraplex.router.router import Router
from loraplex.telemetry.config import TelemetryConfig
from loraplex.telemetry.tracing import Tracing
from loraplex.tenancy.config import TenancyConfig
from loraplex.testing.fake_actuator import FakeActuator
from loraplex.testing.fake_executor import FakeExecutor, fake_manifest, fake_model
from loraplex.testing.tiny_controller import TINY_BASE, start_tiny_controller
from loraplex.testing.tiny_tokenizer import build_tiny_tokenizer
from loraplex.traces.config import TraceConfig
from loraplex.traces.recorder import TraceRecorder
from loraplex.traces.writer import TraceWriter

ACME_KEY = "lpx_acme_key_of_the_telemetry_tests"
GLOBEX_KEY = "lpx_globex_key_of_the_telemetry_tests"
ADMIN_KEY = "lpx_admin_key_of_the_telemetry_tests"


class Source:
    def __init__(self) -> None:
        self.away = False
        """Nothing can be read."""

    @contextmanager
    def open(self, digest: Digest) -> Iterator[tuple[AdapterManifest, str]]:
        if self.away:
            raise Unavailable("the artifact store does not answer")
        yield fake_manifest(digest, base_model_id=TINY_BASE), "nowhere"


class Machines(FakeActuator):
    """Behind each replica that is started there is an engine with a stream server."""

    def __init__(self, stack: AsyncExitStack, tracing: Tracing) -> None:
        super().__init__([NodeStatus(name="node-0", gpu="", num_gpus=1)])
        self._stack = stack
        self._tracing = tracing
        self.secret: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.executors: list[FakeExecutor] = []
        self.source = Source()

    async def start(self, target: ReplicaTarget, *, epoch: int) -> ReplicaRoute:
        route = await super().start(target, epoch=epoch)
        executor = FakeExecutor(model=fake_model(base_model_id=TINY_BASE, vocab_size=400), num_pages=512)
        self.executors.append(executor)
        loop = EngineLoop(
            replica_id=target.replica_id,
            executor=executor,
            engine_config=EngineConfig(max_running=16),
            source=self.source,
            tracing=self._tracing,
        )
        loop.start()
        server = ReplicaServer(loop, cluster_secret=await self.secret, config=ReplicaConfig(stop_grace_s=0.0))
        port = await server.start("127.0.0.1")
        self._stack.push_async_callback(server.stop)
        return ReplicaRoute(
            replica_id=route.replica_id,
            base_model_id=route.base_model_id,
            address=f"127.0.0.1:{port}",
            group=target.group,
        )


@dataclass
class Platform:
    controller: Controller
    gateway: Gateway
    machines: Machines

    def client(self, key: str | None) -> httpx.AsyncClient:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        transport = httpx.ASGITransport(app=self.gateway.http_app)
        return httpx.AsyncClient(transport=transport, base_url="http://gateway", headers=headers, timeout=30)

    async def metrics(self, key: str | None = ADMIN_KEY) -> str:
        async with self.client(key) as client:
            return (await client.get("/metrics")).text

    async def metrics_with(self, *series: str) -> str:
        """The text once samples that begin so are there; TimeoutError when they do not come."""
        async with asyncio.timeout(10):
            while True:
                text = await self.metrics()
                if all(f"\n{name}" in text for name in series):
                    return text
                await asyncio.sleep(0.02)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tiny")


@pytest.fixture
def telemetry_config() -> TelemetryConfig:
    return TelemetryConfig(fleet_poll_s=0.05)


@pytest.fixture
def fleet_config() -> FleetConfig:
    return FleetConfig()


@pytest.fixture
def tracing() -> Tracing:
    """Off; tests of traces have one of their own."""
    return Tracing()


@pytest.fixture
async def platform(
    tokenizer_dir: Path,
    tmp_path: Path,
    telemetry_config: TelemetryConfig,
    fleet_config: FleetConfig,
    tracing: Tracing,
) -> AsyncIterator[Platform]:
    async with AsyncExitStack() as stack:
        machines = Machines(stack, tracing)
        traces = TraceConfig(send_interval_s=0.02, write_interval_s=0.05)
        writer = TraceWriter(traces, str(tmp_path / "traces"))
        stack.push_async_callback(asyncio.to_thread, writer.close)
        controller = await start_tiny_controller(
            tmp_path / "data",
            tokenizer=tokenizer_dir,
            max_context_tokens=256,
            keys=[
                ("acme", Role.TENANT_ADMIN, ACME_KEY),
                ("globex", Role.MEMBER, GLOBEX_KEY),
                ("operators", Role.ADMIN, ADMIN_KEY),
            ],
            adapters=[("acme", "pirate", 1)],
            machines=machines,
            fleet=fleet_config,
            trace_sink=writer,
        )
        stack.push_async_callback(controller.stop)
        machines.secret.set_result(controller.cluster_secret)
        gateway_id = GatewayId("gw-1")
        router = Router(gateway_id=gateway_id, tracing=tracing)
        stack.push_async_callback(router.close)

        async def send(batch: bytes) -> None:
            gateway.metrics.trace_store(await controller.record_traces(gateway_id, batch))

        recorder = TraceRecorder(traces, send=send)
        gateway = Gateway(
            GatewayConfig(),
            gateway_id=gateway_id,
            control=controller,
            dispatcher=router,
            tracer=recorder,
            tenancy=TenancyConfig(slice_s=0.05),
            telemetry=telemetry_config,
            tracing=tracing,
            on_routes=router.update,
            loads=router.loads,
            num_queued=router.num_queued,
        )
        await recorder.start()
        stack.push_async_callback(recorder.close)
        await gateway.start()
        stack.push_async_callback(gateway.stop)
        async with asyncio.timeout(20):
            while gateway.not_ready() is not None:  # noqa: ASYNC110 (what is waited for has no event)
                await asyncio.sleep(0.01)
        yield Platform(controller=controller, gateway=gateway, machines=machines)
