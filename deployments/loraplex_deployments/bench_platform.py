"""What the platform adds to its engine, and what a thousand adapters cost: figures of a running Ray on this machine.

The engine alone and the same load through HTTP, in turns in one run, both with one torch thread and the
demo base; then the start of the platform with 3 and with 1,003 adapters (the faster of some starts each). Prints one
JSON object:

    python -m loraplex_deployments.bench_platform
"""

import argparse
import asyncio
import json
import shutil
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from loraplex.bench.engine_bench import run_engine_bench
from loraplex.bench.options import EngineBenchOptions, EngineLoad, EngineSetup
from loraplex.bench.results import LoadResult
from loraplex.config.platform import PlatformConfig, ServeConfig, parse_platform_config
from loraplex.core.ids import TenantName
from loraplex.demo import PIRATE
from loraplex.demo.base import DEMO_BASE_ID, prepare_demo_base
from loraplex.loadgen.closed_loop import run_closed_loop
from loraplex.loadgen.completion import CompletionClient, Sample
from loraplex.loadgen.config import RequestConfig
from loraplex.loadgen.http_client import HttpClient
from loraplex.loadgen.prompts import TokenizerPrompts
from loraplex.loadgen.report import LoadReport, summarize
from loraplex.loadgen.targets import Target
from loraplex.tenancy.keys import new_key

from loraplex_deployments.demo_setup import ensure_demo
from loraplex_deployments.launch import RunningPlatform, start_platform

_INPUT_TOKENS = 64
_OUTPUT_TOKENS = 64
_STREAMS = 16
_ROUNDS = 3
_STARTS = 3
_SINGLE_REQUESTS = 8
_PROCESSES = {
    "gateway": "ServeReplica:loraplex:gateway",
    "serve_proxy": "ProxyActor",
    "haproxy": "haproxy -db",
    "haproxy_manager": "HAProxyManager",
    "replica": "ReplicaActor",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path(".loraplex/models"))
    parser.add_argument("--adapters", type=int, default=1000, help="registered copies with different weights")
    parser.add_argument("--parts", default="overhead,adapters")
    parser.add_argument("--proxy", choices=("haproxy", "python"), default=ServeConfig().proxy)
    options = parser.parse_args()
    base = prepare_demo_base(options.cache, _say)
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as folder:
        root = Path(folder)
        (root / "models").symlink_to(options.cache.resolve())
        parts = {
            "overhead": lambda: bench_overhead(base, root, options.proxy),
            "adapters": lambda: bench_adapters(root, options.adapters, options.proxy),
        }
        figures = {name: parts[name]() for name in options.parts.split(",")}
    machine = {"cpus": psutil.cpu_count(), "python": sys.version.split()[0], "torch": torch.__version__}
    print(json.dumps({"machine": machine, **figures}, indent=2))


def bench_overhead(base: Path, root: Path, proxy: str) -> dict[str, Any]:
    """TTFT at concurrency 1 and tokens/s at 16 streams: the engine alone and through Serve and HTTP, in turns while the
    platform is up, so that whatever else the machine does hits both alike. Medians over the rounds."""
    platform = start_platform(_config(root, proxy), _say)
    try:
        demo = ensure_demo(platform, root / "demo.json", DEMO_BASE_ID, new_key())
        platform.wait_ready()
        tenant = demo["tenants"][0]
        target = Target(tenant=tenant["name"], model=DEMO_BASE_ID, key=tenant["key"])
        _load(platform, target, base, requests=4, streams=2, seed=0)
        ttft_ms: dict[str, list[float]] = {"engine": [], "http": []}
        tokens_per_s: dict[str, list[float]] = {"engine": [], "http": []}
        cpu_ms: dict[str, list[float]] = {}
        errors: dict[str, int] = {}
        for round_ in range(1, _ROUNDS + 1):
            ttft_ms["engine"].append(_engine(base, streams=1, seed=round_).ttft_s.p50 * 1e3)
            single, _ = _load(platform, target, base, requests=_SINGLE_REQUESTS, streams=1, seed=round_)
            assert single.ttft_s is not None
            ttft_ms["http"].append(single.ttft_s.p50 * 1e3)
            tokens_per_s["engine"].append(_engine(base, streams=_STREAMS, seed=round_).output_tokens_per_s)
            many, cpu = _load(platform, target, base, requests=2 * _STREAMS, streams=_STREAMS, seed=_ROUNDS + round_)
            tokens_per_s["http"].append(many.output_tokens_per_s)
            for name, value in cpu.items():
                cpu_ms.setdefault(name, []).append(value)
            errors |= single.errors | many.errors
    finally:
        platform.stop()
    ttft = {name: statistics.median(values) for name, values in ttft_ms.items()}
    rate = {name: statistics.median(values) for name, values in tokens_per_s.items()}
    return {
        "proxy": proxy,
        "input_tokens": _INPUT_TOKENS,
        "output_tokens": _OUTPUT_TOKENS,
        "torch_threads": 1,
        "rounds": _ROUNDS,
        "engine_ttft_ms": ttft["engine"],
        "http_ttft_ms": ttft["http"],
        "added_ttft_ms": ttft["http"] - ttft["engine"],
        "streams": _STREAMS,
        "engine_tokens_per_s": rate["engine"],
        "http_tokens_per_s": rate["http"],
        "http_over_engine": rate["http"] / rate["engine"],
        "cpu_ms_per_token": {name: statistics.median(values) for name, values in cpu_ms.items()},
        "errors": errors,
    }


def bench_adapters(root: Path, count: int, proxy: str) -> dict[str, Any]:
    """Start-up with the demo's adapters alone and with ``count`` more; listing and one request to each of them."""
    config = _config(root, proxy)
    few_s = min(_start_and_stop(config, root) for _ in range(_STARTS))
    platform = start_platform(config, _say)
    try:
        demo = ensure_demo(platform, root / "demo.json", DEMO_BASE_ID, new_key())
        platform.wait_ready()
        tenant = demo["tenants"][0]
        registering_s = _register_copies(platform, TenantName(tenant["name"]), root, count)
    finally:
        platform.stop()
    many_s = min(_start_and_stop(config, root) for _ in range(_STARTS))
    platform = start_platform(config, _say)
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
    return {
        "registered": len(listed),
        "registering_s": registering_s,
        "start_s_with_demo_adapters": few_s,
        "start_s_with_all": many_s,
        "added_start_s": many_s - few_s,
        "listing_ms": listing_s * 1e3,
        "answered": answered,
        "answering_s": answering_s,
    }


def _config(root: Path, proxy: str) -> PlatformConfig:
    ports = []
    for _ in range(2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    text = f"""
demo: true
data_dir: {root}
listen: {{http_port: {ports[0]}, grpc_port: {ports[1]}}}
serve: {{proxy: {proxy}}}
base_models:
  - id: {DEMO_BASE_ID}
    model: demo
    executor: {{num_threads: 1, dtype: float32}}
    engine: {{max_step_tokens: 256}}
"""
    return parse_platform_config(text, source="bench")


def _engine(base: Path, *, streams: int, seed: int) -> LoadResult:
    setup = EngineSetup(model=str(base), dtype="float32", threads=1, num_pages=400, max_step_tokens=256)
    load = EngineLoad(
        requests=_SINGLE_REQUESTS if streams == 1 else 2 * streams,
        input_tokens=_INPUT_TOKENS,
        output_tokens=_OUTPUT_TOKENS,
        concurrency=streams,
        seed=seed,
    )
    return run_engine_bench(EngineBenchOptions(setup=setup, load=load)).result


def _load(
    platform: RunningPlatform, target: Target, base: Path, *, requests: int, streams: int, seed: int
) -> tuple[LoadReport, dict[str, float]]:
    """The report, and the CPU milliseconds per token of each process that a token passes."""
    prompts = TokenizerPrompts(base, seed=seed)

    async def run() -> list[Sample]:
        http = HttpClient(platform.http_url, connect_timeout_s=5.0)
        try:
            return await run_closed_loop(
                [target],
                CompletionClient(http, RequestConfig()),
                prompts,
                num_requests=requests,
                concurrency=streams,
                prompt_tokens=_INPUT_TOKENS,
                output_tokens=_OUTPUT_TOKENS,
            )
        finally:
            http.close()

    before = _cpu_seconds()
    client_s = time.process_time()
    samples = asyncio.run(run())
    report = summarize(samples, client_cpu_s=time.process_time() - client_s)
    after = _cpu_seconds()
    tokens = max(1, report.output_tokens)
    cpu_ms = {name: (after[name] - before[name]) / tokens * 1e3 for name in after}
    return report, cpu_ms | {"client": report.client_cpu_s / tokens * 1e3}


def _cpu_seconds() -> dict[str, float]:
    """User and system seconds so far of the processes that Ray named as in _PROCESSES."""
    totals = dict.fromkeys(_PROCESSES, 0.0)
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
            times = process.cpu_times()
        except psutil.Error:
            continue
        for name, part in _PROCESSES.items():
            if part in title:
                totals[name] += times.user + times.system
    return totals


def _start_and_stop(config: PlatformConfig, root: Path) -> float:
    """Seconds from nothing to ready."""
    started_s = time.perf_counter()
    platform = start_platform(config, _say)
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


def _say(message: str) -> None:
    print(message, file=sys.stderr)


if __name__ == "__main__":
    main()
