"""A gateway over fakes: two tenants, an administrator, one base with a real small tokenizer, scripted tokens."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from loraplex.core.control import BaseModelView, ReplicaRoute
from loraplex.core.ids import BaseModelId, GatewayId, ReplicaId
from loraplex.core.request import EngineRequest, FinishReason, OutputToken, TokenLogprob
from loraplex.core.tenant import Role
from loraplex.gateway import tokenizer
from loraplex.gateway.config import GatewayConfig
from loraplex.gateway.gateway import Gateway
from loraplex.gateway.tokenizer import TextCodec
from loraplex.tenancy.config import TenancyConfig
from loraplex.testing.fake_control import FakeControl
from loraplex.testing.fake_dispatcher import FakeDispatcher, Script
from loraplex.testing.tiny_tokenizer import build_tiny_tokenizer
from loraplex.traces.row import TraceRow

ACME_KEY = "lpx_acme_admin_key"
ACME_MEMBER_KEY = "lpx_acme_member_key"
GLOBEX_KEY = "lpx_globex_admin_key"
ADMIN_KEY = "lpx_platform_admin_key"
BASE = "tiny-base"
CONTEXT = 256


@dataclass
class Rows:
    """A Tracer that keeps what it gets."""

    rows: list[TraceRow] = field(default_factory=list)

    def record(self, row: TraceRow) -> None:
        self.rows.append(row)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tiny")


@pytest.fixture(scope="session")
def codec(tokenizer_dir: Path) -> TextCodec:
    return TextCodec(str(tokenizer_dir))


def script_of(codec: TextCodec, text: str, **kwargs: Any) -> Callable[[EngineRequest], Script]:
    """A script that says ``text``, with made-up log probabilities."""
    ids = codec.backend.encode(text, add_special_tokens=False).ids

    def script(request: EngineRequest) -> Script:
        count = request.sampling.num_logprobs
        return Script(tokens=tuple(_token(token_id, count) for token_id in ids), **kwargs)

    return script


def _token(token_id: int, count: int | None) -> OutputToken:
    if count is None:
        return OutputToken(token_id=token_id)
    top = tuple(TokenLogprob(token_id=token_id + i, logprob=-0.5 - i) for i in range(count))
    return OutputToken(token_id=token_id, logprob=-0.5, top_logprobs=top)


@dataclass
class World:
    gateway: Gateway
    control: FakeControl
    dispatcher: FakeDispatcher
    tracer: Rows
    codec: TextCodec
    http: httpx.AsyncClient = field(init=False)

    def __post_init__(self) -> None:
        self.http = self.client(ACME_KEY)

    def says(self, text: str, **kwargs: Any) -> None:
        """From now on the engine answers ``text``."""
        self.dispatcher.script = self.script(text, **kwargs)

    def script(self, text: str, **kwargs: Any) -> Callable[[EngineRequest], Script]:
        return script_of(self.codec, text, **kwargs)

    def client(self, key: str | None) -> httpx.AsyncClient:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        transport = httpx.ASGITransport(app=self.gateway.http_app)
        return httpx.AsyncClient(transport=transport, base_url="http://gateway", headers=headers)

    async def eventually(self, check: Callable[[], object], *, timeout_s: float = 3.0) -> None:
        """Waits until ``check`` holds; TimeoutError when it does not."""
        async with asyncio.timeout(timeout_s):
            while not check():  # noqa: ASYNC110 (what is waited for has no event)
                await asyncio.sleep(0.005)

    async def eventually_async(self, read: Callable[[], Awaitable[object]], expected: object) -> None:
        """Waits until ``read`` gives ``expected``; TimeoutError when it does not."""
        async with asyncio.timeout(3.0):
            while await read() != expected:  # noqa: ASYNC110 (as above)
                await asyncio.sleep(0.02)


def make_control(tokenizer_dir: Path) -> FakeControl:
    base = BaseModelId(BASE)
    control = FakeControl(
        base_models=(
            BaseModelView(base_model_id=base, directory=str(tokenizer_dir), max_context_tokens=CONTEXT, created_s=1.0),
        ),
        routes=(ReplicaRoute(replica_id=ReplicaId("fake-0"), base_model_id=base, address="127.0.0.1:1"),),
    )
    control.add_tenant("acme")
    control.add_tenant("globex")
    control.add_key("acme", ACME_KEY, role=Role.TENANT_ADMIN)
    control.add_key("acme", ACME_MEMBER_KEY, role=Role.MEMBER)
    control.add_key("globex", GLOBEX_KEY, role=Role.TENANT_ADMIN)
    control.add_key("", ADMIN_KEY, role=Role.ADMIN)
    control.add_adapter("acme", "pirate")
    control.add_adapter("acme", "pirate", b"newer weights")
    control.add_adapter("globex", "lawyer")
    return control


@pytest.fixture
async def world(tokenizer_dir: Path, codec: TextCodec, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(tokenizer, "TextCodec", lambda _directory: codec)
    control = make_control(tokenizer_dir)
    dispatcher = FakeDispatcher(script_of(codec, "Hello there.", finish_reason=FinishReason.STOP))
    tracer = Rows()
    config = GatewayConfig(visibility_wait_s=1.0, snapshot_poll_s=5.0)
    gateway = Gateway(
        config,
        gateway_id=GatewayId("gw-1"),
        control=control,
        dispatcher=dispatcher,
        tracer=tracer,
        tenancy=TenancyConfig(slice_s=0.05),
    )
    await gateway.start()
    made = World(gateway=gateway, control=control, dispatcher=dispatcher, tracer=tracer, codec=codec)
    try:
        yield made
    finally:
        await made.http.aclose()
        await gateway.stop()
