"""A platform with paced replicas and adapters of several tenants on a Ray of this machine, for measurements of who is
served how.

Registers the tenants and adapters of a workload, sends it, and says of the same what the exact simulator predicts.
Called by ``bench_crowd`` and ``bench_greedy``.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import platform
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import httpx
import msgspec
import numpy as np
from loraplex.bench.peft_files import write_random_peft
from loraplex.bench.random_adapters import random_manifests
from loraplex.config.platform import PlatformConfig, parse_platform_config
from loraplex.core.errors import Unavailable
from loraplex.core.ids import TenantName
from loraplex.core.plan import BasePlacement, GroupPlan, Plan, Shape
from loraplex.core.tenant import Role, TenantLimits
from loraplex.cost.loads import Tier
from loraplex.engine import EngineConfig
from loraplex.loadgen.completion import CompletionClient, Sample
from loraplex.loadgen.config import RequestConfig
from loraplex.loadgen.http_client import HttpClient
from loraplex.loadgen.open_loop import run_open_loop
from loraplex.loadgen.outcomes import Outcomes
from loraplex.loadgen.prediction import outcomes_of
from loraplex.loadgen.prompts import RandomTokens
from loraplex.loadgen.schedule import PlannedRequest
from loraplex.loadgen.targets import Target
from loraplex.model_runner.build import load_model_spec
from loraplex.router.config import RouterConfig
from loraplex.simulator.exact import simulate_exact
from loraplex.simulator.scenarios import SMALL
from loraplex.simulator.types import AdapterSize, CostKey, SimulationInput, Slo
from loraplex.tenancy.keys import new_key
from loraplex.testing.paced_config import PacedConfig
from loraplex.testing.paced_executor import paced_cost
from loraplex.traces.arrivals import AdapterName, Arrivals

from loraplex_deployments.bench_processes import CpuMeter, CpuUse
from loraplex_deployments.launch import RunningPlatform, data_dir_lock, start_platform
from loraplex_deployments.ports import free_ports

_MODEL = "random:tiny-llama"
_GPU = "h100-80gb"
_LORA_RANK = 16
_VISIBLE_TIMEOUT_S = 60.0

Say = Callable[[str], None]


class TenantSetup(msgspec.Struct, frozen=True, kw_only=True):
    replicas: int = 4
    gateways: int = 1
    factor: float = 4.0
    """How many times slower than an H100 the replicas are, so that a small machine's own work stays small beside it."""
    router: RouterConfig = msgspec.field(default_factory=RouterConfig)
    engine: EngineConfig = msgspec.field(default_factory=EngineConfig)

    @property
    def paced(self) -> PacedConfig:
        return PacedConfig(profile=_GPU, base=str(SMALL), factor=self.factor)

    @property
    def executor(self) -> str:
        """What the replicas run, in words."""
        return f"paced: {SMALL} on {_GPU}, {self.factor:g} times slower"


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Where and with what something was measured."""

    cores: int
    processor: str
    commit: str | None

    @classmethod
    def this(cls) -> Self:
        found = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        return cls(
            cores=os.cpu_count() or 1,
            processor=names[0].partition(":")[2].strip() if names else platform.processor(),
            commit=found.stdout.strip() or None,
        )


class TenantPlatform:
    """It is ready."""

    def __init__(self, running: RunningPlatform, targets: Mapping[AdapterName, Target]) -> None:
        self._url = running.http_url
        self._targets = targets

    def send(self, arrivals: Arrivals, *, seed: int) -> tuple[list[Sample], CpuUse]:
        """Each request at its time; samples in the order of the arrivals. ``seed``: of the prompts."""
        return asyncio.run(self._send(arrivals, seed))

    async def _send(self, arrivals: Arrivals, seed: int) -> tuple[list[Sample], CpuUse]:
        columns = (arrivals.arrival_s, arrivals.adapter, arrivals.prompt_tokens, arrivals.output_tokens)
        schedule = [
            PlannedRequest(
                index=index,
                at_s=at_s,
                target=self._targets[arrivals.adapters[adapter]],
                prompt_tokens=prompt_tokens,
                output_tokens=output_tokens,
            )
            for index, (at_s, adapter, prompt_tokens, output_tokens) in enumerate(
                zip(*(column.tolist() for column in columns), strict=True)
            )
        ]
        config = RequestConfig(seed=seed)
        http = HttpClient(self._url, connect_timeout_s=config.connect_timeout_s)
        prompts = RandomTokens(load_model_spec(_MODEL, SMALL).vocab_size, seed=seed)
        meter = CpuMeter()
        try:
            samples = await run_open_loop(schedule, CompletionClient(http, config), prompts)
        finally:
            http.close()
        return sorted(samples, key=lambda sample: sample.scheduled_s), meter.read()


def error_counts(samples: Iterable[Sample]) -> dict[str, int]:
    """HTTP status or kind of failure, and how often."""
    return dict(sorted(Counter(sample.error for sample in samples if sample.error is not None).items()))


def within_context(arrivals: Arrivals) -> Arrivals:
    """With lengths that the model which clients see has room for."""
    limit = load_model_spec(_MODEL, SMALL).max_context_tokens
    prompt_tokens = np.minimum(arrivals.prompt_tokens, limit * 3 // 4)
    return dataclasses.replace(
        arrivals,
        prompt_tokens=prompt_tokens,
        output_tokens=np.minimum(arrivals.output_tokens, limit - prompt_tokens),
    )


@contextlib.contextmanager
def tenant_platform(
    setup: TenantSetup, adapters: Sequence[AdapterName], folder: Path, say: Say
) -> Iterator[TenantPlatform]:
    """With ``adapters`` and their tenants. ``folder``: data directory; what was registered there earlier is used
    again. Raises what ``start_platform`` raises."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with contextlib.ExitStack() as stack:
        stack.enter_context(data_dir_lock(folder))
        say(f"starting a platform: {setup.router.policy}, {setup.replicas} replicas, {setup.gateways} gateways")
        running = start_platform(_config(setup, folder), say)
        stack.callback(running.stop)
        targets = _register(running, adapters, folder)
        running.wait_ready()
        _wait_visible(running.http_url, targets)
        yield TenantPlatform(running, targets)


def predicted(setup: TenantSetup, arrivals: Arrivals, slo: Slo) -> Outcomes:
    """What the exact simulator says of such a platform: one router, no HTTP; adapters lie on disk at first."""
    group = GroupPlan(name="", shape=Shape(), gpu=_GPU, bases=(BasePlacement(base_model_id=SMALL),))
    groups = tuple(dataclasses.replace(group, name=f"group-{index}") for index in range(setup.replicas))
    given = SimulationInput(
        plan=Plan(version=1, groups=groups),
        arrivals=arrivals,
        adapters=tuple(AdapterSize(lora_rank=_LORA_RANK) for _ in arrivals.adapters),
        costs={
            CostKey(gpu=_GPU, base_model_id=SMALL, shape=Shape()): paced_cost(setup.paced, setup.engine, SMALL),
        },
        slo=slo,
        engine=setup.engine,
        router=setup.router,
        adapter_tier=Tier.DISK,
    )
    return outcomes_of(given, simulate_exact(given))


def _config(setup: TenantSetup, folder: Path) -> PlatformConfig:
    http_port, grpc_port = free_ports(2)
    cost = paced_cost(setup.paced, setup.engine, SMALL)
    adapter_bytes = cost.memory.adapter_bytes(_LORA_RANK)
    load_s, disk_s = (cost.loads.seconds(adapter_bytes, tier) for tier in (Tier.HOST, Tier.DISK))
    settings: dict[str, Any] = {
        "data_dir": str(folder),
        "listen": {"http_port": http_port, "grpc_port": grpc_port},
        "serve": {"gateways": setup.gateways},
        "router": msgspec.to_builtins(setup.router) | {"adapter_load_s": load_s, "adapter_fetch_s": disk_s - load_s},
        "base_models": [
            {
                "id": SMALL,
                "model": _MODEL,
                "replicas": setup.replicas,
                "num_cpus": 0.1,
                "executor": {"num_threads": 1},
                "engine": msgspec.to_builtins(setup.engine),
                "paced": msgspec.to_builtins(setup.paced),
            }
        ],
    }
    return parse_platform_config(json.dumps(settings), source="bench")


def _register(running: RunningPlatform, adapters: Sequence[AdapterName], folder: Path) -> dict[AdapterName, Target]:
    """Every tenant gets a key, every adapter weights of its own."""
    keys = {str(adapter.tenant): new_key() for adapter in adapters}
    for name, key in keys.items():
        running.call("ensure_tenant", name, TenantLimits())
        running.call("ensure_key", TenantName(name), Role.MEMBER, key)
    known = {
        (view.ref.tenant, view.ref.name)
        for view in running.call("snapshot", after_epoch=-1, after_version=-1, timeout_s=1).adapters
    }
    spec = load_model_spec(_MODEL, SMALL)
    manifests = random_manifests(spec, count=len(adapters), lora_ranks=(_LORA_RANK,))
    for index, (adapter, manifest) in enumerate(zip(adapters, manifests, strict=True)):
        if (adapter.tenant, adapter.name) not in known:
            directory = folder / "new-adapter"
            write_random_peft(directory, manifest, spec, seed=index)
            running.call("ensure_adapter", TenantName(str(adapter.tenant)), adapter.name, str(directory))
            shutil.rmtree(directory)
    return {
        adapter: Target(tenant=str(adapter.tenant), model=adapter.name, key=keys[str(adapter.tenant)])
        for adapter in adapters
    }


def _wait_visible(url: str, targets: Mapping[AdapterName, Target]) -> None:
    """Returns when the gateways' snapshots have all of them. Raises Unavailable."""
    wanted: dict[str | None, set[str]] = {}
    for target in targets.values():
        wanted.setdefault(target.key, set()).add(target.model)
    deadline_s = time.monotonic() + _VISIBLE_TIMEOUT_S
    for key, models in wanted.items():
        listed: set[str] = set()
        while not listed.issuperset(models):
            if time.monotonic() > deadline_s:
                raise Unavailable(f"the gateway lists {len(listed)} models of a tenant, it has {len(models)}")
            answer = httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {key}"}, timeout=10)
            listed = {entry["id"] for entry in answer.json()["data"]} if answer.status_code == 200 else set()
            time.sleep(0.05)
