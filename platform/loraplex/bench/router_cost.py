"""What a decision costs the gateway: CPU time of the router from a request to its place on a replica.

Replicas are up, report, and have adapters resident; nothing is behind them. Each request is placed, and every replica
reports once a hundred requests, as in service. Run by hand: ``python -m loraplex.bench.router_cost``.
"""

import argparse
import asyncio
import json
import random
import statistics
import time

import msgspec

from loraplex.core.adapter import AdapterRef
from loraplex.core.control import ReplicaRoute
from loraplex.core.ids import BaseModelId, Digest, GatewayId, ReplicaId, RequestId, TenantName
from loraplex.core.request import EngineRequest, FinishReason, RequestOutput, SamplingParams
from loraplex.core.wire import LoadReport, ReplicaFrame, ReplicaInfo
from loraplex.router.client import ReplicaListener
from loraplex.router.router import Router

_BASE = BaseModelId("llama3-8b")
_RESIDENT = 100
"""Adapters on each replica."""
_REPORT_EVERY = 100


class RouterCost(msgspec.Struct, frozen=True, kw_only=True):
    """Microseconds of CPU time in the gateway's one thread."""

    replicas: int
    adapters: int
    prompt_tokens: int
    decisions: int
    decision_us: float
    """Median: from the request to the replica that it goes to."""
    decision_p99_us: float
    request_us: float
    """Mean of a request's whole way but its tokens: the decision, its end, and its part of the replicas' reports."""
    requests_per_s: float


class _Silent:
    """Implements ReplicaClient."""

    def __init__(self, route: ReplicaRoute, listener: ReplicaListener) -> None:
        self.route, self.listener = route, listener
        self.open: list[RequestId] = []
        self.num_received = self.num_ended = 0

    def send(self, submits: tuple[EngineRequest, ...], aborts: tuple[RequestId, ...]) -> None:
        self.open.extend(request.request_id for request in submits)
        self.num_received += len(submits)

    async def close(self) -> None:
        pass

    def report(self, *, steps: int, resident: tuple[Digest, ...] | None = None, first: bool = False) -> None:
        """With the end of the older half of what is there."""
        ended, self.open = self.open[: len(self.open) // 2], self.open[len(self.open) // 2 :]
        self.num_ended += len(ended)
        info = ReplicaInfo(
            replica_id=self.route.replica_id,
            base_model_id=_BASE,
            max_context_tokens=8192,
            num_pages=25_000,
            page_size=16,
            max_running=256,
            max_step_tokens=2048,
        )
        load = LoadReport(
            num_running=len(self.open),
            num_free_pages=20_000,
            num_queued_tokens=500,
            credits=320 - len(self.open),
            num_received=self.num_received,
            steps=steps,
            generated_tokens=steps * 30,
            busy_s=steps * 0.01,
            prefilled_tokens=steps * 100,
            resident_adapters=resident,
        )
        outputs = tuple(RequestOutput(request_id=name, finish_reason=FinishReason.LENGTH) for name in ended)
        self.listener.on_frame(ReplicaFrame(replica=info if first else None, outputs=outputs, load=load))


async def measure(
    *, num_replicas: int, num_adapters: int, num_requests: int, prompt_tokens: int, seed: int = 0
) -> RouterCost:
    draw = random.Random(seed)
    clients: list[_Silent] = []

    def connect(route: ReplicaRoute, listener: ReplicaListener) -> _Silent:
        clients.append(_Silent(route, listener))
        return clients[-1]

    router = Router(gateway_id=GatewayId("bench"), connect=connect)
    names = [ReplicaId(f"replica-{index}") for index in range(num_replicas)]
    router.update(
        tuple(ReplicaRoute(replica_id=name, base_model_id=_BASE, address=f"{name}:1") for name in names), "secret"
    )
    digests = [Digest(f"{index:064x}") for index in range(num_adapters)]
    for client in clients:
        client.report(steps=1, resident=tuple(draw.sample(digests, min(_RESIDENT, num_adapters))), first=True)
    requests = [_request(index, draw, digests, prompt_tokens) for index in range(num_requests)]
    decisions_ns: list[int] = []
    begun_ns = time.thread_time_ns()
    for index, request in enumerate(requests):
        started_ns = time.thread_time_ns()
        router.dispatch((request,))
        decisions_ns.append(time.thread_time_ns() - started_ns)
        if index % _REPORT_EVERY == _REPORT_EVERY - 1:
            for client in clients:
                client.report(steps=2 + index)
    all_s = (time.thread_time_ns() - begun_ns) * 1e-9
    router.validate()
    await router.close()
    decisions_ns.sort()
    return RouterCost(
        replicas=num_replicas,
        adapters=num_adapters,
        prompt_tokens=prompt_tokens,
        decisions=num_requests,
        decision_us=round(statistics.median(decisions_ns) / 1e3, 1),
        decision_p99_us=round(decisions_ns[int(0.99 * num_requests)] / 1e3, 1),
        request_us=round(1e6 * all_s / num_requests, 1),
        requests_per_s=round(num_requests / all_s),
    )


def _request(index: int, draw: random.Random, digests: list[Digest], prompt_tokens: int) -> EngineRequest:
    tenant = TenantName(f"tenant{index % 50}")
    digest = digests[int(len(digests) * draw.random() ** 2)]
    return EngineRequest(
        request_id=RequestId(f"r{index}"),
        tenant=tenant,
        base_model_id=_BASE,
        adapter=AdapterRef(tenant=tenant, name="a", version=1, digest=digest),
        prompt_token_ids=tuple(draw.randrange(1000) for _ in range(prompt_tokens)),
        sampling=SamplingParams(max_tokens=256, seed=0),
        arrival_s=0.0,
        cache_salt=tenant,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU time of a routing decision.")
    parser.add_argument("--replicas", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=2000)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--prompt-tokens", type=int, default=500)
    options = parser.parse_args()
    found = asyncio.run(
        measure(
            num_replicas=options.replicas,
            num_adapters=options.adapters,
            num_requests=options.requests,
            prompt_tokens=options.prompt_tokens,
        )
    )
    print(json.dumps(msgspec.to_builtins(found)))


if __name__ == "__main__":
    main()
