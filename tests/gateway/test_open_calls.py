"""A gateway refuses calls beyond its limit at once, over HTTP and gRPC, and stays observable."""

import asyncio
from typing import Any

import grpc
import httpx
import pytest
from loraplex.core.errors import Overloaded
from loraplex.core.ids import GatewayId
from loraplex.gateway.config import GatewayConfig
from loraplex.gateway.gateway import Gateway
from loraplex.gateway.proto import loraplex_v1_pb2 as pb
from loraplex.testing.fake_dispatcher import FakeDispatcher

from tests.gateway.conftest import ACME_KEY, ProxyContext

CHAT = {"model": "pirate", "messages": [{"role": "user", "content": "Hi"}]}


async def test_more_calls_than_allowed_are_429_and_probes_go_on(world: Any) -> None:
    dispatcher = FakeDispatcher(world.script("Hello there, and hello again."), step_s=0.1)
    gateway = Gateway(
        GatewayConfig(),
        gateway_id=GatewayId("gw-2"),
        control=world.control,
        dispatcher=dispatcher,
        tracer=world.tracer,
        max_open_calls=2,
    )
    await gateway.start()
    transport = httpx.ASGITransport(app=gateway.http_app)
    headers = {"authorization": f"Bearer {ACME_KEY}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway", headers=headers) as client:
        held = [asyncio.create_task(client.post("/v1/chat/completions", json=CHAT)) for _ in range(2)]
        await world.eventually(lambda: dispatcher.num_running == 2)
        refused = await client.post("/v1/chat/completions", json=CHAT)
        assert refused.status_code == 429
        assert (refused.json()["error"]["type"], refused.json()["error"]["code"]) == ("overloaded_error", "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        context = ProxyContext([("x-api-key", ACME_KEY)])
        with pytest.raises(Overloaded):
            await gateway.grpc_servicer.ListModels(pb.ListModelsRequest(), context)
        assert context.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await client.get("/health")).status_code == 200
        assert 'status="429"' in (await client.get("/metrics")).text
        assert [reply.status_code for reply in await asyncio.gather(*held)] == [200, 200]
        assert (await client.get("/v1/models")).status_code == 200
    await gateway.stop()
