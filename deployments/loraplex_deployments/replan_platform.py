"""A small platform that needs another plan: two bases on four logical GPUs of two Ray nodes on this machine, three
replicas of the base that few ask for.

Gateway, router, engine, controller and planner are the real ones; the replicas take the time of a slowed H100 and
compute nothing. Starts it, sends it traffic and says what it recorded; ends what it started. Called by ``demo_replan``
and by a notebook.
"""

import contextlib
import json
import os
import random
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from loraplex.bench.peft_files import write_random_peft
from loraplex.bench.random_adapters import random_manifests
from loraplex.config.platform import PlatformConfig, parse_platform_config
from loraplex.controller.fleet.config import Mode
from loraplex.controller.fleet.replan import Task, problem_for, recent_arrivals, simulated
from loraplex.core.errors import NotFound, Unavailable
from loraplex.core.fleet import NodeStatus
from loraplex.core.ids import BaseModelId, TenantName
from loraplex.core.rollout import FleetStatus
from loraplex.core.tenant import Role, TenantLimits
from loraplex.cost.profile import CostProfile
from loraplex.loadgen.completion import CompletionClient, Sample
from loraplex.loadgen.config import ReplayConfig, RequestConfig
from loraplex.loadgen.http_client import HttpClient
from loraplex.loadgen.open_loop import run_open_loop
from loraplex.loadgen.prompts import RandomTokens
from loraplex.loadgen.schedule import plan_replay
from loraplex.loadgen.targets import Target, assign_targets
from loraplex.model_runner.build import load_model_spec
from loraplex.planner.baselines import Baseline
from loraplex.planner.problem import Problem
from loraplex.simulator.types import Slo
from loraplex.tenancy.keys import new_key
from loraplex.traces.arrivals import Arrivals, TraceRequest

from loraplex_deployments.bench_platform import free_ports
from loraplex_deployments.bootstrap import ensure_admin_key
from loraplex_deployments.launch import Progress, RunningPlatform, start_platform
from loraplex_deployments.local_cluster import LocalCluster

_MODEL = "random:tiny-llama"
_PROFILE, _PROFILE_BASE, _FACTOR = "h100-80gb", "llama3-8b", 12.0
EXECUTOR = f"paced: {_PROFILE_BASE} on {_PROFILE}, {_FACTOR:g} times slower"
_NODES, _GPUS_PER_NODE = ("node-0", "node-1"), 2
_TENANT = TenantName("acme")
_REPLICAS = {"chat": 3, "code": 1}
RATES = {"chat": 1.0, "code": 5.0}
"""Requests per second: not what the replicas were bought for."""
_ADAPTERS_PER_BASE, _LORA_RANK = 3, 16
_PROMPT_TOKENS, _OUTPUT_TOKENS = (600, 1400), 24
_RECORDED_TIMEOUT_S = 60.0
SLO = Slo(ttft_s=3.0, tpot_s=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """What a platform recorded, as the planner takes it."""

    problem: Problem
    in_force: Baseline
    """The plan by which it ran, to be held against others."""


class ReplanPlatform:
    """One that is ready. ``close`` ends it."""

    def __init__(
        self,
        platform: RunningPlatform,
        config: PlatformConfig,
        targets: tuple[Target, ...],
        admin_key: str,
        started: contextlib.ExitStack,
    ) -> None:
        """``started`` ends, last first, what was started."""
        self.platform = platform
        self.targets = targets
        self.admin_key = admin_key
        self._config = config
        self._started = started
        self._since_s = time.time()

    @classmethod
    def start(cls, say: Progress, *, mode: Mode, planning_interval_s: float = 300.0) -> Self:
        """``mode``: who makes plans, as ``controller.fleet.mode``. Raises what ``start_platform`` raises."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loraplex-demo-")))
            say(f"starting {len(_NODES)} Ray nodes with {_GPUS_PER_NODE} logical GPUs each")
            cluster = LocalCluster(head_cpus=2)
            stack.callback(cluster.close)
            for name in _NODES:
                cluster.add_node(name, num_cpus=2, num_gpus=_GPUS_PER_NODE, accelerator="H100")
            config = _config(folder, cluster.address, mode, planning_interval_s)
            platform = start_platform(config, say)
            stack.callback(platform.stop)
            key = new_key()
            platform.call("ensure_tenant", str(_TENANT), TenantLimits())
            platform.call("ensure_key", _TENANT, Role.MEMBER, key)
            names = _register_adapters(platform, folder)
            say("waiting for the replicas")
            platform.wait_ready()
            while not platform.call("fleet_status").settled:
                time.sleep(0.2)
            targets = tuple(Target(tenant=str(_TENANT), model=name, key=key) for name in names)
            return cls(platform, config, targets, ensure_admin_key(platform, config), stack.pop_all())

    def close(self) -> None:
        """Idempotent."""
        self._started.close()

    @property
    def url(self) -> str:
        return self.platform.http_url

    @property
    def status(self) -> FleetStatus:
        status: FleetStatus = self.platform.call("fleet_status")
        return status

    @property
    def groups(self) -> tuple[str, ...]:
        """Those of now, in words."""
        return tuple(
            sorted(
                f"{'+'.join(group.bases)} on tp {group.shape.tp} x pp {group.shape.pp}" for group in self.status.groups
            )
        )

    async def replay(self, trace: list[TraceRequest], *, seed: int) -> list[Sample]:
        """Sends each request at its time. What is recorded from now on is what ``recorded`` reads."""
        self._since_s = time.time()
        http = HttpClient(self.url, connect_timeout_s=10)
        try:
            schedule = plan_replay(trace, assign_targets(trace, self.targets), ReplayConfig())
            prompts = RandomTokens(load_model_spec(_MODEL, BaseModelId("demo")).vocab_size, seed=seed)
            return await run_open_loop(schedule, CompletionClient(http, RequestConfig(timeout_s=120)), prompts)
        finally:
            http.close()

    def recorded(self, num_requests: int) -> Recorded:
        """What was recorded since the last replay began, once it is ``num_requests``. Unavailable when it does not get
        there."""
        fleet = self._config.controller.fleet
        active = self.status.active.plan
        task = Task(
            trace_url=self._config.trace_url,
            since_s=self._since_s,
            nodes=tuple(NodeStatus(name=name, gpu=_PROFILE, num_gpus=_GPUS_PER_NODE) for name in _NODES),
            current=active,
            config=fleet.planning,
            bases=tuple(_REPLICAS),
            lora_ranks={f"{target.tenant}/{target.model}": _LORA_RANK for target in self.targets},
        )
        problem = problem_for(task, _wait_recorded(task, num_requests))
        plan, attainment = simulated(task.current, problem)
        setting = f"plan {active.version}"
        return Recorded(
            problem=problem,
            in_force=Baseline(
                name="in force", plan=plan, attainment=attainment, setting=setting, tried=1, is_alpaserve=False
            ),
        )


def make_trace(duration_s: float) -> list[TraceRequest]:
    """Poisson arrivals at ``RATES`` over the adapters of each base; always the same."""
    numbers = random.Random(7)
    requests = []
    for base, rate in RATES.items():
        at_s = numbers.expovariate(rate)
        while at_s < duration_s:
            requests.append(
                TraceRequest(
                    arrival_s=at_s,
                    tenant=str(_TENANT),
                    base_model=base,
                    adapter=f"{base}-{numbers.randrange(_ADAPTERS_PER_BASE)}",
                    prompt_tokens=numbers.randint(*_PROMPT_TOKENS),
                    output_tokens=_OUTPUT_TOKENS,
                )
            )
            at_s += numbers.expovariate(rate)
    return sorted(requests, key=lambda request: request.arrival_s)


def _config(folder: Path, address: str, mode: Mode, planning_interval_s: float) -> PlatformConfig:
    profile = folder / "slow.json"
    profile.write_bytes(CostProfile.load(_PROFILE).slowed(_FACTOR).to_json())
    http_port, grpc_port = free_ports(2)
    settings = {
        "data_dir": str(folder),
        "listen": {"http_port": http_port, "grpc_port": grpc_port},
        "ray": {"address": address, "single_machine": True},
        "serve": {"gateway_resources": {"node:__internal_head__": 0.001}},
        "gateway": {"first_token_deadline_s": 3 * SLO.ttft_s},
        "traces": {"send_interval_s": 0.5, "write_interval_s": 1.0},
        "controller": {
            "fleet": {
                "mode": mode,
                "planning": {
                    "profiles": [str(profile)],
                    "profile_bases": dict.fromkeys(_REPLICAS, _PROFILE_BASE),
                    "interval_s": planning_interval_s,
                    "window_s": 2 * planning_interval_s,
                    "min_requests": 100,
                    "ttft_s": SLO.ttft_s,
                    "tpot_s": SLO.tpot_s,
                    "max_evaluations": 60,
                    "max_search_s": 60.0,
                    "reassign_interval_s": 0,
                },
            }
        },
        "base_models": [
            {
                "id": base,
                "model": _MODEL,
                "num_cpus": 0.5,
                "num_gpus": 1,
                "replicas": replicas,
                "paced": {"profile": str(profile), "base": _PROFILE_BASE},
            }
            for base, replicas in _REPLICAS.items()
        ],
    }
    return parse_platform_config(json.dumps(settings), source="demo")


def _register_adapters(platform: RunningPlatform, folder: Path) -> list[str]:
    names: list[str] = []
    for base in _REPLICAS:
        spec = load_model_spec(_MODEL, BaseModelId(base))
        manifests = random_manifests(spec, count=_ADAPTERS_PER_BASE, lora_ranks=(_LORA_RANK,))
        for index, manifest in enumerate(manifests):
            directory = folder / "new-adapter"
            write_random_peft(directory, manifest, spec, seed=len(names))
            _name_base(directory, base)
            names.append(f"{base}-{index}")
            platform.call("ensure_adapter", _TENANT, names[-1], str(directory))
            shutil.rmtree(directory)
    return names


def _name_base(directory: Path, base: str) -> None:
    """Two bases have the same shapes: the adapter says which it is for."""
    file = directory / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config | {"base_model_name_or_path": base}), encoding="utf-8")


def _wait_recorded(task: Task, num_requests: int) -> Arrivals:
    deadline_s = time.monotonic() + _RECORDED_TIMEOUT_S
    while time.monotonic() < deadline_s:
        with contextlib.suppress(NotFound):
            found = recent_arrivals(task)
            if len(found) >= num_requests:
                return found
        time.sleep(0.2)
    raise Unavailable(f"fewer than {num_requests} requests were recorded in {_RECORDED_TIMEOUT_S:.0f} s")
