"""The real gateway and controller, listening on a port: two tenants, an administrator, one base, scripted answers."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import uvicorn
from loraplex.cli.main import app
from loraplex.controller.fleet.config import FleetConfig
from loraplex.core.fleet import NodeStatus
from loraplex.core.ids import GatewayId
from loraplex.core.request import EngineRequest, FinishReason, OutputToken
from loraplex.core.tenant import Role
from loraplex.gateway.config import GatewayConfig
from loraplex.gateway.gateway import Gateway
from loraplex.gateway.tokenizer import TextCodec
from loraplex.testing.fake_actuator import FakeActuator
from loraplex.testing.fake_dispatcher import FakeDispatcher, Script
from loraplex.testing.tiny_controller import TINY_BASE, start_tiny_controller
from loraplex.testing.tiny_tokenizer import build_tiny_tokenizer
from loraplex.traces.recorder import RecorderCounters
from loraplex.traces.row import ArrivalRow, TraceRow
from typer.testing import CliRunner, Result

ANSWER = "Many tenants share one base model."
KEYS = {name: f"lpx_{name}_key_of_the_tests" for name in ("acme", "globex", "admin")}


@dataclass
class _Rows:
    rows: list[TraceRow] = field(default_factory=list)
    arrivals: list[ArrivalRow] = field(default_factory=list)

    @property
    def counters(self) -> RecorderCounters:
        return RecorderCounters()

    def arrived(self, row: ArrivalRow) -> None:
        self.arrivals.append(row)

    def record(self, row: TraceRow) -> None:
        self.rows.append(row)


@dataclass
class Platform:
    """What the tests know of the running server."""

    url: str
    key_file: Path
    tokenizer: Path
    requests: list[EngineRequest]


class _Server:
    """Runs gateway and HTTP server on an event loop of their own thread."""

    def __init__(self, tokenizer: Path, data_dir: Path, machines: FakeActuator | None) -> None:
        self.requests: list[EngineRequest] = []
        self.port = 0
        self._tokenizer = tokenizer
        self._data_dir = data_dir
        self._machines = machines
        self._server: uvicorn.Server | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> "_Server":
        self._thread.start()
        deadline = time.monotonic() + 60
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

        control = await start_tiny_controller(
            self._data_dir,
            tokenizer=self._tokenizer,
            max_context_tokens=2048,
            keys=[
                ("acme", Role.TENANT_ADMIN, KEYS["acme"]),
                ("globex", Role.TENANT_ADMIN, KEYS["globex"]),
                ("operators", Role.ADMIN, KEYS["admin"]),
            ],
            adapters=[("acme", "pirate", 1), ("acme", "pirate", 2), ("globex", "lawyer", 3)],
            machines=self._machines,
            fleet=FleetConfig(tick_s=0.02, drain_quiet_s=0.0, retry_first_s=0.01, retry_max_s=0.05),
        )
        gateway = Gateway(
            GatewayConfig(),
            gateway_id=GatewayId("gw-1"),
            control=control,
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
        await control.stop()


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tiny")


@pytest.fixture
def platform(tokenizer_dir: Path, tmp_path: Path) -> Iterator[Platform]:
    with _platform(tokenizer_dir, tmp_path, None) as running:
        yield running


@pytest.fixture
def machines() -> FakeActuator:
    """Of ``fleet_platform``."""
    return FakeActuator([NodeStatus(name="node-1", gpu="g", num_gpus=2)])


@pytest.fixture
def fleet_platform(tokenizer_dir: Path, tmp_path: Path, machines: FakeActuator) -> Iterator[Platform]:
    """Its controller carries out plans."""
    with _platform(tokenizer_dir, tmp_path, machines) as running:
        yield running


@contextmanager
def _platform(tokenizer_dir: Path, tmp_path: Path, machines: FakeActuator | None) -> Iterator[Platform]:
    with _Server(tokenizer_dir, tmp_path / "data", machines) as server:
        url = f"http://127.0.0.1:{server.port}"
        key_file = tmp_path / "demo.json"
        key_file.write_text(
            json.dumps(
                {
                    "http": url,
                    "grpc": "127.0.0.1:1",
                    "admin_key": KEYS["admin"],
                    "tenants": [
                        {"name": "acme", "key": KEYS["acme"], "models": [TINY_BASE, "pirate"]},
                        {"name": "globex", "key": KEYS["globex"], "models": [TINY_BASE, "lawyer"]},
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
