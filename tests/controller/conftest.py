"""A started controller on a fresh data directory, a tiny base, and adapters made with numpy."""

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loraplex.controller.config import ControllerConfig, ControllerOptions
from loraplex.controller.controller import Controller
from loraplex.core.control import BaseModelView
from loraplex.core.ids import BaseModelId
from loraplex.core.model import ModelSpec
from loraplex.registry.config import RegistryConfig
from loraplex.tenancy import TenancyConfig
from safetensors.numpy import save

TINY = ModelSpec(
    base_model_id=BaseModelId("tiny"),
    family="llama",
    hidden_size=16,
    intermediate_size=24,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    vocab_size=32,
    max_context_tokens=64,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
)


class Traces:
    """A TraceSink that keeps what it gets."""

    def __init__(self) -> None:
        self.batches: list[bytes] = []

    def append(self, batch: bytes) -> None:
        self.batches.append(batch)


@pytest.fixture
def traces() -> Traces:
    return Traces()


@pytest.fixture
def make_files() -> Callable[..., dict[str, bytes]]:
    def make(seed: int = 0, rank: int = 4, hidden: int = 16) -> dict[str, bytes]:
        rng = np.random.default_rng(seed)
        prefix = "base_model.model.model.layers.0.self_attn.q_proj"
        tensors = {
            f"{prefix}.lora_A.weight": rng.normal(size=(rank, hidden)).astype(np.float32),
            f"{prefix}.lora_B.weight": rng.normal(size=(16, rank)).astype(np.float32),
        }
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj"]}
        return {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": save(tensors)}

    return make


@pytest.fixture
def make_options(tmp_path: Path) -> Callable[..., ControllerOptions]:
    def make(**registry: Any) -> ControllerOptions:
        return ControllerOptions(
            data_dir=tmp_path / "data",
            controller=ControllerConfig(),
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
