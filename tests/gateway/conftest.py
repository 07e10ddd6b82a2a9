"""A gateway over the real controller: two tenants, an administrator, one base with a real small tokenizer, and a
dispatcher that answers scripted tokens."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import grpc
import httpx
import pytest
from loraplex.controller.controller import Controller
from loraplex.core.control import ControlPlane
from loraplex.core.errors import Unavailable
from loraplex.core.ids import GatewayId
from loraplex.core.request import EngineRequest, FinishReason, OutputToken, TokenLogprob
from loraplex.core.tenant import Role
from loraplex.gateway import tokenizer
from loraplex.gateway.config import GatewayConfig
from loraplex.gateway.gateway import Gateway
from loraplex.gateway.tokenizer import TextCodec
from loraplex.registry.config import RegistryConfig
from loraplex.tenancy.config import TenancyConfig
from loraplex.testing.fake_dispatcher import FakeDispatcher, Script
from loraplex.testing.tiny_controller import start_tiny_controller
from loraplex.testing.tiny_tokenizer import build_tiny_tokenizer
from loraplex.traces.recorder import RecorderCounters
from loraplex.traces.row import ArrivalRow, TraceRow

ACME_KEY = "lpx_acme_admin_key_of_the_tests"
ACME_MEMBER_KEY = "lpx_acme_member_key_of_the_tests"
GLOBEX_KEY = "lpx_globex_admin_key_of_the_tests"
ADMIN_KEY = "lpx_platform_admin_key_of_the_tests"
CONTEXT = 256


@dataclass
class Rows:
    """A Tracer that keeps what it gets."""

    rows: list[TraceRow] = field(default_factory=list)
    arrivals: list[ArrivalRow] = field(default_factory=list)
    num_dropped: int = 0

    @property
    def counters(self) -> RecorderCounters:
        return RecorderCounters(sent=len(self.rows), dropped=self.num_dropped)

    def arrived(self, row: ArrivalRow) -> None:
        self.arrivals.append(row)

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


class Control:
    """Passes every call on to the controller and notes it; while ``away``, every call fails as a dead one's would. An
    attribute that a test sets under a method's name is called instead."""

    def __init__(self, controller: Controller, data_dir: Path) -> None:
        self.controller = controller
        self.data_dir = data_dir
        self.away = False
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        async def call(*args: Any, **options: Any) -> Any:
            if self.away:
                raise Unavailable("the controller is away; try again shortly")
            self.calls.append((name, args))
            return await getattr(self.controller, name)(*args, **options)

        return call

    def rows_of(self, name: str) -> list[Any]:
        """What all calls of ``report_usage`` or ``lease_quota`` brought."""
        return [row for called, args in self.calls if called == name for row in args[1]]

    def uploads(self) -> list[Path]:
        """The open ones."""
        return list((self.data_dir / "uploads").iterdir())


@dataclass
class World:
    gateway: Gateway
    control: Control
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


class ProxyContext:
    """As much of Serve's RayServegRPCContext as the servicer may use."""

    def __init__(self, metadata: list[tuple[str, str]]) -> None:
        self._metadata = metadata
        self.code: grpc.StatusCode | None = None
        self.details = ""
        self.trailing: list[tuple[str, Any]] = []

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return self._metadata

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details

    def set_trailing_metadata(self, trailing_metadata: list[tuple[str, Any]]) -> None:
        self.trailing = trailing_metadata


async def start_control(tokenizer_dir: Path, directory: Path) -> Control:
    controller = await start_tiny_controller(
        directory / "data",
        tokenizer=tokenizer_dir,
        max_context_tokens=CONTEXT,
        keys=[
            ("acme", Role.TENANT_ADMIN, ACME_KEY),
            ("acme", Role.MEMBER, ACME_MEMBER_KEY),
            ("globex", Role.TENANT_ADMIN, GLOBEX_KEY),
            ("operators", Role.ADMIN, ADMIN_KEY),
        ],
        adapters=[("acme", "pirate", 1), ("acme", "pirate", 2), ("globex", "lawyer", 3)],
        registry=RegistryConfig(approved_url_prefixes=(f"file://{directory}/approved",)),
    )
    return Control(controller, directory / "data")


@pytest.fixture
async def world(
    tokenizer_dir: Path, codec: TextCodec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[World]:
    monkeypatch.setattr(tokenizer, "TextCodec", lambda _directory: codec)
    control = await start_control(tokenizer_dir, tmp_path)
    dispatcher = FakeDispatcher(script_of(codec, "Hello there.", finish_reason=FinishReason.STOP))
    tracer = Rows()
    config = GatewayConfig(visibility_wait_s=1.0, snapshot_poll_s=5.0, upload_chunk_bytes=16 * 1024)
    gateway = Gateway(
        config,
        gateway_id=GatewayId("gw-1"),
        control=cast(ControlPlane, control),
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
        await control.controller.stop()
