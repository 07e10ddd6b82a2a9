"""Replicas with the fake executor behind real gRPC streams, and routers to them."""

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager

from loraplex.core.adapter import AdapterManifest, AdapterRef
from loraplex.core.control import ReplicaRoute
from loraplex.core.ids import BaseModelId, Digest, GatewayId, ReplicaId, RequestId, TenantName
from loraplex.core.request import EngineRequest, FinishReason, SamplingParams
from loraplex.engine import EngineConfig
from loraplex.replica.config import ReplicaConfig
from loraplex.replica.engine_loop import EngineLoop
from loraplex.replica.server import ReplicaServer
from loraplex.router.config import RouterConfig
from loraplex.router.router import Router
from loraplex.router.stream import RoutedStream
from loraplex.testing.fake_executor import FakeExecutor, expected_tokens, fake_manifest

SECRET = "s" * 16
POISONED, UNSTAGEABLE, MISSING = "d" * 64, "e" * 64, "f" * 64
_ids = itertools.count()


class FakeSource:
    @contextmanager
    def open(self, digest: Digest) -> Iterator[tuple[AdapterManifest, str]]:
        if digest == MISSING:
            raise OSError("gone")
        yield fake_manifest(digest), f"/artifacts/{digest}"


class Replica:
    def __init__(
        self,
        replica_id: str,
        *,
        step_s: float = 0.002,
        engine: EngineConfig | None = None,
        config: ReplicaConfig | None = None,
    ) -> None:
        self.replica_id = ReplicaId(replica_id)
        config = config or ReplicaConfig(stop_grace_s=0.0)
        self.executor = FakeExecutor(num_pages=256, step_s=step_s, poisoned=[POISONED], unstageable=[UNSTAGEABLE])
        self.loop = EngineLoop(
            replica_id=self.replica_id,
            executor=self.executor,
            engine_config=engine or EngineConfig(max_running=16),
            source=FakeSource(),
            config=config,
        )
        self.server = ReplicaServer(self.loop, cluster_secret=SECRET, config=config)
        self.port = 0

    async def start(self) -> "Replica":
        self.loop.start()
        self.port = await self.server.start("127.0.0.1")
        return self

    @property
    def route(self) -> ReplicaRoute:
        return ReplicaRoute(
            replica_id=self.replica_id, base_model_id=BaseModelId("fake-base"), address=f"127.0.0.1:{self.port}"
        )


async def start_replica(stack: AsyncExitStack, replica_id: str, **kwargs: object) -> Replica:
    replica = await Replica(replica_id, **kwargs).start()  # type: ignore[arg-type]
    stack.push_async_callback(replica.server.stop)
    return replica


def start_router(
    stack: AsyncExitStack, *replicas: Replica, secret: str = SECRET, gateway: str = "g1", **config: float
) -> Router:
    router = Router(gateway_id=GatewayId(gateway), config=RouterConfig(**config))  # type: ignore[arg-type]
    stack.push_async_callback(router.close)
    router.update(tuple(replica.route for replica in replicas), secret)
    return router


def make_request(
    *, max_tokens: int = 20, adapter: str | None = None, tenant: str = "acme", length: int = 6
) -> EngineRequest:
    number = next(_ids)
    ref = None
    if adapter is not None:
        ref = AdapterRef(tenant=TenantName(tenant), name="a", version=1, digest=Digest(adapter))
    return EngineRequest(
        request_id=RequestId(f"r{number}"),
        tenant=TenantName(tenant),
        base_model_id=BaseModelId("fake-base"),
        adapter=ref,
        prompt_token_ids=tuple((number + i) % 900 for i in range(length)),
        sampling=SamplingParams(max_tokens=max_tokens, seed=number),
        arrival_s=time.time(),
        cache_salt=tenant,
    )


async def read(stream: RoutedStream) -> tuple[dict[str, list[int]], dict[str, FinishReason], list[str]]:
    tokens: dict[str, list[int]] = {}
    reasons: dict[str, FinishReason] = {}
    errors: list[str] = []
    while outputs := await stream.next_outputs():
        for output in outputs:
            assert output.request_id not in reasons
            tokens.setdefault(output.request_id, []).extend(token.token_id for token in output.tokens)
            if output.finish_reason is not None:
                reasons[output.request_id] = output.finish_reason
            if output.error is not None:
                errors.append(output.error)
    return tokens, reasons, errors


async def check(router: Router, *requests: EngineRequest) -> None:
    tokens, reasons, _ = await read(router.dispatch(requests))
    for request in requests:
        assert reasons[request.request_id] is FinishReason.LENGTH
        expected = expected_tokens(request, request.sampling.max_tokens)
        assert tuple(tokens[request.request_id]) == expected


async def eventually(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        await asyncio.sleep(0.01)
