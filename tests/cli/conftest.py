"""The real gateway over fakes, listening on a port: two tenants, an administrator, one base, scripted answers."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import uvicorn
from loraplex.cli.main import app
from loraplex.core.control import BaseModelView, ReplicaRoute
from loraplex.core.ids import BaseModelId, GatewayId, ReplicaId
from loraplex.core.request import EngineRequest, FinishReason, OutputToken
from loraplex.core.tenant import Role
from loraplex.gateway.config import GatewayConfig
from loraplex.gateway.gateway import Gateway
from loraplex.gateway.tokenizer import TextCodec
from loraplex.testing.fake_control import FakeControl
from loraplex.testing.fake_dispatcher import FakeDispatcher, Script
from loraplex.testing.tiny_tokenizer import build_tiny_tokenizer
from loraplex.traces.row import TraceRow
from typer.testing import CliRunner, Result

ANSWER = "Many tenants share one base model."
BASE = "tiny-base"


@dataclass
class _Rows:
    rows: list[TraceRow] = field(default_factory=list)

    def record(self, row: TraceRow) -> None:
        self.rows.append(row)


@dataclass
class Platform:
    """What the tests know of the running server."""

    url: str
    key_file: Path
    tokenizer: Path
    requests: list[EngineRequest]


def _make_control(tokenizer: Path) -> FakeControl:
    base = BaseModelId(BASE)
    control = FakeControl(
        base_models=(
            BaseModelView(base_model_id=base, directory=str(tokenizer), max_context_tokens=2048, created_s=1.0),
        ),
        routes=(ReplicaRoute(replica_id=ReplicaId("fake-0"), base_model_id=base, address="127.0.0.1:1"),),
    )
    control.add_tenant("acme")
    control.add_tenant("globex")
    control.add_key("acme", "lpx_acme", role=Role.TENANT_ADMIN)
    control.add_key("globex", "lpx_globex", role=Role.TENANT_ADMIN)
    control.add_key("", "lpx_admin", role=Role.ADMIN)
    control.add_adapter("acme", "pirate")
    control.add_adapter("acme", "pirate", b"newer weights")
    control.add_adapter("globex", "lawyer")
    return control


class _Server:
    """Runs gateway and HTTP server on an event loop of their own thread."""

    def __init__(self, tokenizer: Path) -> None:
        self.requests: list[EngineRequest] = []
        self.port = 0
        self._tokenizer = tokenizer
        self._server: uvicorn.Server | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> "_Server":
        self._thread.start()
        deadline = time.monotonic() + 20
        while not self.port:
            assert self._thread.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.should_exit = True
        self._thread.join()

    async def _run(self) -> None:
        codec = TextCodec(str(self._tokenizer))
        answer = codec.backend.encode(ANSWER, add_special_tokens=False).ids

        def script(request: EngineRequest) -> Script:
            self.requests.append(request)
            ids = answer if not request.sampling.ignore_eos else (answer * 50)[: request.sampling.max_tokens]
            return Script(tokens=tuple(OutputToken(token_id=i) for i in ids), finish_reason=FinishReason.STOP)

        gateway = Gateway(
            GatewayConfig(),
            gateway_id=GatewayId("gw-1"),
            control=_make_control(self._tokenizer),
            dispatcher=FakeDispatcher(script, step_s=0.001),
            tracer=_Rows(),
        )
        await gateway.start()
        config = uvicorn.Config(gateway.http_app, log_level="warning", lifespan="off")
        self._server = uvicorn.Server(config)
        with socket.create_server(("127.0.0.1", 0)) as listening:
            self.port = listening.getsockname()[1]
            await self._server.serve(sockets=[listening])
        await gateway.stop()


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tiny")


@pytest.fixture
def platform(tokenizer_dir: Path, tmp_path: Path) -> Iterator[Platform]:
    with _Server(tokenizer_dir) as server:
        url = f"http://127.0.0.1:{server.port}"
        key_file = tmp_path / "demo.json"
        key_file.write_text(
            json.dumps(
                {
                    "http": url,
                    "grpc": "127.0.0.1:1",
                    "admin_key": "lpx_admin",
                    "tenants": [
                        {"name": "acme", "key": "lpx_acme", "models": [BASE, "pirate"]},
                        {"name": "globex", "key": "lpx_globex", "models": [BASE, "lawyer"]},
                    ],
                }
            )
        )
        yield Platform(url=url, key_file=key_file, tokenizer=tokenizer_dir, requests=server.requests)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LORAPLEX_URL", raising=False)
    monkeypatch.delenv("LORAPLEX_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run() -> Callable[..., Result]:
    """Runs the program in this process."""

    def run(*arguments: object, **options: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)  # type: ignore[arg-type]

    return run


@pytest.fixture
def call(run: Callable[..., Result], platform: Platform) -> Callable[..., Result]:
    """Runs the program against the platform and expects success."""

    def call(*arguments: object, **options: object) -> Result:
        result = run(*arguments, "--demo-file", platform.key_file, **options)
        assert result.exit_code == 0, result.output
        return result

    return call
