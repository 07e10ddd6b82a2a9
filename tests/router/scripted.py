"""A router over replicas that a test plays. No network."""

import itertools
from collections.abc import Callable

from loraplex.core.adapter import AdapterRef
from loraplex.core.control import ReplicaRoute
from loraplex.core.ids import BaseModelId, Digest, GatewayId, ReplicaId, RequestId, TenantName
from loraplex.core.request import EngineRequest, FinishReason, OutputToken, Priority, RequestOutput, SamplingParams
from loraplex.core.wire import LoadReport, ReplicaFrame, ReplicaInfo
from loraplex.router.client import ReplicaListener
from loraplex.router.config import RouterConfig
from loraplex.router.router import Router

BASE = BaseModelId("base")
_ids = itertools.count()


class ScriptedReplica:
    """Implements ReplicaClient; a test plays the replica."""

    def __init__(self, route: ReplicaRoute, listener: ReplicaListener) -> None:
        self.route = route
        self.listener = listener
        self.submitted: dict[RequestId, EngineRequest] = {}
        self.aborted: list[RequestId] = []
        self.closed = False

    def send(self, submits: tuple[EngineRequest, ...], aborts: tuple[RequestId, ...]) -> None:
        self.submitted.update({request.request_id: request for request in submits})
        self.aborted.extend(aborts)

    async def close(self) -> None:
        self.closed = True

    def up(self, credits: int = 100, num_received: int | None = None) -> None:
        info = ReplicaInfo(
            replica_id=self.route.replica_id, base_model_id=BASE, max_context_tokens=100, num_pages=10, page_size=4
        )
        load = LoadReport(credits=credits, num_received=num_received, resident_adapters=())
        self.listener.on_frame(ReplicaFrame(replica=info, load=load))

    def report(self, credits: int, num_received: int | None = None) -> None:
        self.listener.on_frame(ReplicaFrame(load=LoadReport(credits=credits, num_received=num_received)))

    def answer(self, *names: str, tokens: tuple[int, ...] = (), end: bool = False) -> None:
        outputs = tuple(
            RequestOutput(
                request_id=RequestId(name),
                tokens=tuple(OutputToken(token_id=token) for token in tokens),
                finish_reason=FinishReason.STOP if end else None,
                num_cached_tokens=3,
            )
            for name in names
        )
        self.listener.on_frame(ReplicaFrame(outputs=outputs))

    def refuse(self, name: str) -> None:
        output = RequestOutput(
            request_id=RequestId(name), finish_reason=FinishReason.ERROR, error="full", error_code="overloaded"
        )
        self.listener.on_frame(ReplicaFrame(outputs=(output,)))

    def down(self) -> None:
        self.submitted.clear()
        self.listener.on_down("test")


class World:
    def __init__(self, *names: str, on_unserved: Callable[[BaseModelId], None] | None = None, **config: float) -> None:
        self.replicas: dict[str, ScriptedReplica] = {}
        self.router = Router(
            gateway_id=GatewayId("g"),
            config=RouterConfig(**config),  # type: ignore[arg-type]
            connect=self.connect,
            on_unserved=on_unserved,
        )
        self.router.update(tuple(map(route, names)), "secret")

    def connect(self, route: ReplicaRoute, listener: ReplicaListener) -> ScriptedReplica:
        self.replicas[route.replica_id] = ScriptedReplica(route, listener)
        return self.replicas[route.replica_id]


def route(name: str) -> ReplicaRoute:
    return ReplicaRoute(replica_id=ReplicaId(name), base_model_id=BASE, address="nowhere:1")


def make(
    name: str | None = None,
    *,
    tenant: str = "t",
    weight: float = 1.0,
    offline: bool = False,
    max_tokens: int = 100,
    adapter: str | None = None,
    prompt: tuple[int, ...] = (1, 2, 3),
) -> EngineRequest:
    ref = None
    if adapter is not None:
        ref = AdapterRef(tenant=TenantName(tenant), name=adapter, version=1, digest=Digest(adapter * 64))
    return EngineRequest(
        request_id=RequestId(name or f"q{next(_ids)}"),
        tenant=TenantName(tenant),
        base_model_id=BASE,
        adapter=ref,
        prompt_token_ids=prompt,
        sampling=SamplingParams(max_tokens=max_tokens, seed=0),
        arrival_s=0.0,
        cache_salt=tenant,
        priority=Priority.OFFLINE if offline else Priority.ONLINE,
        weight=weight,
    )
