"""The gateway over the real controller: what the fake control plane leaves out is checked here."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loraplex.controller.config import ControllerConfig, ControllerOptions
from loraplex.controller.controller import Controller
from loraplex.core.control import BaseModelView
from loraplex.core.ids import BaseModelId, GatewayId, TenantName
from loraplex.core.model import ModelSpec
from loraplex.core.tenant import Role, TenantLimits
from loraplex.gateway.config import GatewayConfig
from loraplex.gateway.gateway import Gateway
from loraplex.registry.config import RegistryConfig
from loraplex.tenancy.config import TenancyConfig
from safetensors.numpy import save

BASE = ModelSpec(
    base_model_id=BaseModelId("tiny-base"),
    family="llama",
    hidden_size=16,
    intermediate_size=24,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    vocab_size=400,
    max_context_tokens=256,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
)
ADMIN_KEY = "lpx_" + "a" * 43
TENANCY = TenancyConfig(slice_s=0.05, silent_after_s=1.0)


class NoTraces:
    def append(self, batch: bytes) -> None:
        raise AssertionError("the test's tracer keeps its rows")


def files(seed: int, *, hidden: int = 16) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    weights = save(
        {
            f"{prefix}.lora_A.weight": rng.normal(size=(4, hidden)).astype(np.float32),
            f"{prefix}.lora_B.weight": rng.normal(size=(16, 4)).astype(np.float32),
        }
    )
    config = json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}).encode()
    return {"adapter_config.json": ("c", config), "adapter_model.safetensors": ("w", weights)}


@pytest.fixture
async def gateway(world: Any, tokenizer_dir: Path, tmp_path: Path) -> AsyncIterator[Gateway]:
    options = ControllerOptions(
        data_dir=tmp_path, controller=ControllerConfig(), registry=RegistryConfig(), tenancy=TENANCY
    )
    controller = Controller(options, trace_sink=NoTraces())
    await controller.start()
    view = BaseModelView(
        base_model_id=BASE.base_model_id, directory=str(tokenizer_dir), max_context_tokens=256, created_s=1.0
    )
    await controller.set_base_models((view,), {BASE.base_model_id: BASE})
    await controller.ensure_tenant("operators", TenantLimits())
    await controller.ensure_key(TenantName("operators"), Role.ADMIN, ADMIN_KEY)
    made = Gateway(
        GatewayConfig(),
        gateway_id=GatewayId("gw"),
        control=controller,
        dispatcher=world.dispatcher,
        tracer=world.tracer,
        tenancy=TENANCY,
    )
    await made.start()
    world.gateway = made
    yield made
    await made.stop()
    await controller.stop()


@pytest.mark.usefixtures("gateway")
async def test_from_tenant_to_rollback(world: Any) -> None:
    async with world.client(ADMIN_KEY) as admin:
        assert (await admin.post("/v1/tenants", json={"name": "initech"})).status_code == 201
        assert (await admin.post("/v1/tenants", json={"name": "initech"})).status_code == 409
        assert (await admin.post("/v1/tenants", json={"name": "../x"})).status_code == 400
        key = (await admin.post("/v1/tenants/initech/keys", json={"role": "tenant_admin"})).json()["key"]
        async with world.client(key) as client:
            for seed in (1, 2):
                made = await client.post("/v1/adapters", data={"name": "poet"}, files=files(seed))
                assert made.status_code == 201, made.text
                assert made.json()["version"] == seed
            wrong = await client.post("/v1/adapters", data={"name": "odd"}, files=files(3, hidden=12))
            assert wrong.status_code == 400
            assert wrong.json()["error"]["code"] == "invalid_adapter"
            assert (await client.post("/v1/adapters", data={"name": "../x"}, files=files(3))).status_code == 400
            assert [a["name"] for a in (await client.get("/v1/adapters")).json()["data"]] == ["poet"]
            body = {"model": "poet", "prompt": "Hi"}
            for version in (2, 1):
                assert (await client.post("/v1/completions", json=body)).status_code == 200
                assert world.dispatcher.requests[-1].adapter.version == version
                back = await client.post("/v1/adapters/poet/rollback", json={"version": 1})
                assert back.json()["current"] is True
            used = 2 * (len(world.codec.encode("Hi")) + len(world.codec.encode("Hello there.")))
            await world.eventually_async(lambda: _used_tokens(admin), used)
            assert (await client.delete("/v1/adapters/poet")).status_code == 200
            assert (await client.post("/v1/completions", json=body)).status_code == 404
        assert (await admin.delete("/v1/tenants/initech")).status_code == 200
        async with world.client(key) as client:
            assert (await client.get("/v1/models")).status_code == 401


@pytest.mark.usefixtures("gateway")
async def test_limits_hold_through_the_lease(world: Any) -> None:
    async with world.client(ADMIN_KEY) as admin:
        await admin.post("/v1/tenants", json={"name": "initech", "limits": {"requests_per_minute": 2}})
        key = (await admin.post("/v1/tenants/initech/keys", json={})).json()["key"]
    async with world.client(key) as client:
        statuses = [
            (await client.post("/v1/completions", json={"model": "tiny-base", "prompt": "Hi"})).status_code
            for _ in range(4)
        ]
    assert statuses == [200, 200, 429, 429]


async def _used_tokens(admin: Any) -> int:
    usage = (await admin.get("/v1/tenants/initech/usage")).json()
    return int(usage["prompt_tokens"] + usage["output_tokens"])
