"""The OpenAPI document, and a fuzz of the API that is generated from it."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, settings
from loraplex.core.control import ControlPlane
from loraplex.core.fleet import NodeStatus
from loraplex.core.ids import GatewayId
from loraplex.core.request import EngineRequest, OutputToken
from loraplex.core.tenant import Role
from loraplex.gateway.config import GatewayConfig
from loraplex.gateway.gateway import Gateway
from loraplex.testing.fake_actuator import FakeActuator
from loraplex.testing.fake_dispatcher import FakeDispatcher, Script
from loraplex.testing.tiny_controller import start_tiny_controller
from loraplex.traces.recorder import RecorderCounters
from schemathesis.specs.openapi.checks import ignored_auth, negative_data_rejection, positive_data_acceptance

KEYS = {"tenant": "lpx_fuzz_tenant_admin_key_of_the_tests", "admin": "lpx_fuzz_admin_key_of_the_tests"}


ADMIN_PATHS = ("/v1/tenants", "/v1/status", "/v1/activity", "/v1/fleet", "/v1/plans", "/v1/decisions")


class NoTracer:
    @property
    def counters(self) -> RecorderCounters:
        return RecorderCounters()

    def arrived(self, row: Any) -> None:
        assert row.prompt_tokens > 0

    def record(self, row: Any) -> None:
        assert row.e2e_s >= 0


def _script(_request: EngineRequest) -> Script:
    return Script(tokens=tuple(OutputToken(token_id=50 + i, logprob=-1.0) for i in range(4)))


async def _serve(
    tokenizer_dir: Path, data_dir: Path, started: threading.Event, ending: threading.Event, port: list[int]
) -> None:
    control = await start_tiny_controller(
        data_dir,
        tokenizer=tokenizer_dir,
        max_context_tokens=256,
        keys=[("fuzz", Role.TENANT_ADMIN, KEYS["tenant"]), ("operators", Role.ADMIN, KEYS["admin"])],
        adapters=[("fuzz", "pirate", 1)],
        machines=FakeActuator([NodeStatus(name="n1", gpu="g", num_gpus=2)]),
    )
    gateway = Gateway(
        GatewayConfig(visibility_wait_s=0.2),
        gateway_id=GatewayId("fuzzed"),
        control=control,
        dispatcher=FakeDispatcher(_script),
        tracer=NoTracer(),
    )
    await gateway.start()
    config = uvicorn.Config(gateway.http_app, host="127.0.0.1", port=0, log_level="warning", access_log=False)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started or gateway.not_ready() is not None:  # noqa: ASYNC110 (uvicorn has no event for it)
        await asyncio.sleep(0.01)
    port.append(server.servers[0].sockets[0].getsockname()[1])
    started.set()
    await asyncio.to_thread(ending.wait)
    server.should_exit = True
    await serving
    await gateway.stop()
    await control.stop()


@pytest.fixture(scope="module")
def url(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    started, ending = threading.Event(), threading.Event()
    port: list[int] = []
    data_dir = tmp_path_factory.mktemp("fuzzed")
    thread = threading.Thread(target=lambda: asyncio.run(_serve(tokenizer_dir, data_dir, started, ending, port)))
    thread.start()
    assert started.wait(60)
    yield f"http://127.0.0.1:{port[0]}"
    ending.set()
    thread.join(30)


async def _document() -> Any:
    gateway = Gateway(
        GatewayConfig(),
        gateway_id=GatewayId("documented"),
        control=cast(ControlPlane, None),  # never started: only its document is read
        dispatcher=FakeDispatcher(_script),
        tracer=NoTracer(),
    )
    transport = httpx.ASGITransport(app=gateway.http_app)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        return (await client.get("/openapi.json")).json()


DOCUMENT = asyncio.run(_document())
schema = schemathesis.openapi.from_dict(DOCUMENT)


@pytest.mark.slow
@schema.parametrize()
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_fuzz(case: Any, url: str) -> None:
    key = KEYS["admin" if case.path.startswith(ADMIN_PATHS) else "tenant"]
    excluded = [ignored_auth, positive_data_acceptance]
    if case.method == "GET":
        # Query parameters that nobody knows are ignored, as is usual.
        excluded.append(negative_data_rejection)
    response = case.call_and_validate(
        base_url=url,
        headers={"authorization": f"Bearer {key}"},
        # The first does not see that the header above stands in for the documented scheme. The second holds whole
        # floats for integers and knows no limits between fields, such as the context.
        excluded_checks=excluded,
    )
    assert response.headers["x-request-id"]
    if response.status_code >= 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_document() -> None:
    assert set(DOCUMENT["paths"]) == {
        "/health",
        "/ready",
        "/metrics",
        "/v1/models",
        "/v1/models/{model_id}",
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/adapters",
        "/v1/adapters/{name}",
        "/v1/adapters/{name}/rollback",
        "/v1/tenants",
        "/v1/tenants/{tenant}",
        "/v1/tenants/{tenant}/keys",
        "/v1/tenants/{tenant}/keys/{key_id}",
        "/v1/tenants/{tenant}/usage",
        "/v1/status",
        "/v1/activity",
        "/v1/fleet",
        "/v1/plans",
        "/v1/plans/active",
        "/v1/plans/rollback",
        "/v1/plans/{version}",
        "/v1/plans/{version}/accept",
        "/v1/decisions",
    }
    for path, operations in DOCUMENT["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"]
            if path.startswith("/v1/"):
                assert operation["security"]
                for status in ("400", "401", "404", "429", "500"):
                    reference = operation["responses"][status]["content"]["application/json"]["schema"]["$ref"]
                    assert reference.endswith("/ErrorReply")
