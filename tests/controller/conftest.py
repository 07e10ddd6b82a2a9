"""A started controller on a fresh data directory, and a tiny base."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from loraplex.controller.config import ControllerConfig, ControllerOptions
from loraplex.controller.controller import Controller
from loraplex.core.control import BaseModelView, TraceStoreStatus
from loraplex.core.ids import BaseModelId
from loraplex.database.config import DatabaseConfig
from loraplex.registry.config import RegistryConfig
from loraplex.tenancy import TenancyConfig
from loraplex.testing.tiny_adapter import tiny_model

TINY = tiny_model(BaseModelId("tiny"), max_context_tokens=64)


class Traces:
    """A TraceSink that keeps what it gets."""

    def __init__(self) -> None:
        self.batches: list[bytes] = []

    def append(self, batch: bytes) -> None:
        self.batches.append(batch)

    def unwritten(self, since_s: float) -> bytes:
        return b""

    def status(self) -> TraceStoreStatus:
        return TraceStoreStatus(
            url="/traces",
            received_rows=len(self.batches),
            written_rows=0,
            buffered_rows=0,
            dropped_rows=len(self.batches),
            repeated_batches=0,
            last_error="no space left",
        )


@pytest.fixture
def traces() -> Traces:
    return Traces()


@pytest.fixture
def make_options(tmp_path: Path, database_url: str) -> Callable[..., ControllerOptions]:
    def make(**registry: Any) -> ControllerOptions:
        return ControllerOptions(
            data_dir=tmp_path / "data",
            controller=ControllerConfig(database=DatabaseConfig(url=database_url)),
            registry=RegistryConfig(**registry),
            tenancy=TenancyConfig(),
        )

    return make


@pytest.fixture
def start(traces: Traces) -> Callable[[ControllerOptions], Any]:
    async def start(options: ControllerOptions) -> Controller:
        controller = Controller(options, trace_sink=traces)
        await controller.start()
        view = BaseModelView(base_model_id=TINY.base_model_id, directory="/tiny", max_context_tokens=64, created_s=0.0)
        await controller.set_base_models((view,), {TINY.base_model_id: TINY})
        return controller

    return start


@pytest.fixture
async def controller(
    make_options: Callable[..., ControllerOptions], start: Callable[[ControllerOptions], Any]
) -> AsyncIterator[Controller]:
    controller = await start(make_options())
    yield controller
    await controller.stop()
