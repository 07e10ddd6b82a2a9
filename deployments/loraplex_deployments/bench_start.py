"""What many registered adapters cost: the start of a platform with the demo's alone and with a thousand more.

Called by ``loraplex bench start``.
"""

import asyncio
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import msgspec
from loraplex.config.platform import PlatformConfig, parse_platform_config
from loraplex.core.ids import TenantName
from loraplex.demo import PIRATE
from loraplex.demo.base import DEMO_BASE_ID
from loraplex.tenancy.keys import new_key

from loraplex_deployments.demo_setup import ensure_demo
from loraplex_deployments.launch import RunningPlatform, start_platform
from loraplex_deployments.ports import free_ports

Say = Callable[[str], None]


class StartBenchResult(msgspec.Struct, frozen=True, kw_only=True):
    registered: int
    registering_s: float
    start_s_with_demo_adapters: float
    """From nothing to ready, the fastest of the starts, as the next."""
    start_s_with_all: float
    added_start_s: float
    listing_ms: float
    answered: int
    """Adapters that gave text when they were asked, once each."""
    answering_s: float


def run_start_bench(root: Path, *, num_adapters: int, num_starts: int, proxy: str, say: Say) -> StartBenchResult:
    """In ``root``, whose folder ``models`` may hold the demo base: start-up with the demo's adapters alone and with
    ``num_adapters`` more; listing and one request to each of them."""
    config = _config(root, proxy)
    few_s = min(_start_and_stop(config, root, say) for _ in range(num_starts))
    platform = start_platform(config, say)
    try:
        demo = ensure_demo(platform, root / "demo.json", DEMO_BASE_ID, new_key())
        platform.wait_ready()
        tenant = demo["tenants"][0]
        registering_s = _register_copies(platform, TenantName(tenant["name"]), root, num_adapters)
    finally:
        platform.stop()
    many_s = min(_start_and_stop(config, root, say) for _ in range(num_starts))
    platform = start_platform(config, say)
    try:
        platform.wait_ready()
        headers = {"authorization": f"Bearer {tenant['key']}"}
        started_s = time.perf_counter()
        listed = httpx.get(f"{platform.http_url}/v1/adapters", headers=headers, timeout=60).json()["data"]
        listing_s = time.perf_counter() - started_s
        started_s = time.perf_counter()
        answered = asyncio.run(_one_request_each(platform, headers, [entry["name"] for entry in listed]))
        answering_s = time.perf_counter() - started_s
    finally:
        platform.stop()
    return StartBenchResult(
        registered=len(listed),
        registering_s=registering_s,
        start_s_with_demo_adapters=few_s,
        start_s_with_all=many_s,
        added_start_s=many_s - few_s,
        listing_ms=listing_s * 1e3,
        answered=answered,
        answering_s=answering_s,
    )


def _config(root: Path, proxy: str) -> PlatformConfig:
    http_port, grpc_port = free_ports(2)
    settings = {
        "demo": True,
        "data_dir": str(root),
        "listen": {"http_port": http_port, "grpc_port": grpc_port},
        "serve": {"proxy": proxy},
        "base_models": [
            {
                "id": DEMO_BASE_ID,
                "model": "demo",
                "executor": {"num_threads": 1, "dtype": "float32"},
                "engine": {"max_step_tokens": 256},
            }
        ],
    }
    return parse_platform_config(json.dumps(settings), source="bench start")


def _start_and_stop(config: PlatformConfig, root: Path, say: Say) -> float:
    """Seconds from nothing to ready."""
    started_s = time.perf_counter()
    platform = start_platform(config, say)
    try:
        ensure_demo(platform, root / "demo.json", DEMO_BASE_ID, new_key())
        platform.wait_ready()
        return time.perf_counter() - started_s
    finally:
        platform.stop()


def _register_copies(platform: RunningPlatform, tenant: TenantName, root: Path, count: int) -> float:
    """Copies of a demo adapter, each with weights scaled by another factor, so that no two are equal."""
    from safetensors.torch import load_file, save_file

    weights = load_file(PIRATE.directory / "adapter_model.safetensors")
    started_s = time.perf_counter()
    for index in range(count):
        folder = root / "copies" / str(index)
        folder.mkdir(parents=True)
        shutil.copy(PIRATE.directory / "adapter_config.json", folder)
        scale = 1.0 + (index + 1) / 128
        save_file(
            {name: tensor * scale if "lora_B" in name else tensor for name, tensor in weights.items()},
            folder / "adapter_model.safetensors",
        )
        platform.call("ensure_adapter", tenant, f"copy-{index}", str(folder))
        shutil.rmtree(folder)
    return time.perf_counter() - started_s


async def _one_request_each(platform: RunningPlatform, headers: dict[str, str], models: list[str]) -> int:
    """How many of ``models`` answered with text."""
    gate = asyncio.Semaphore(16)
    async with httpx.AsyncClient(base_url=platform.http_url, headers=headers, timeout=120) as client:

        async def ask(model: str) -> bool:
            async with gate:
                body = {"model": model, "prompt": "Ahoy", "max_tokens": 2, "ignore_eos": True}
                answer = await client.post("/v1/completions", json=body)
                return answer.status_code == 200 and bool(answer.json()["choices"][0]["text"])

        return sum(await asyncio.gather(*(ask(model) for model in models)))
