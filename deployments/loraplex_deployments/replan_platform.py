"""A small platform that may need another plan: bases on logical GPUs of Ray nodes on this machine, or on its GPUs.

Gateway, router, engine, controller and planner are the real ones; paced replicas take the time of a slowed H100 and
compute nothing. Starts it, sends it traffic and says what it recorded; ends what it started. Called by ``demo_replan``,
``bench_drift`` and a notebook.
"""

import contextlib
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import msgspec
from loraplex.bench.peft_files import write_random_peft
from loraplex.bench.random_adapters import random_manifests
from loraplex.config.platform import PlatformConfig
from loraplex.controller.fleet.config import Mode, PlanningConfig
from loraplex.controller.fleet.replan import Task, problem_for, recent_arrivals, simulated
from loraplex.core.errors import NotFound, Unavailable
from loraplex.core.ids import BaseModelId
from loraplex.core.plan import Plan
from loraplex.core.rollout import DecisionRecord, FleetStatus
from loraplex.core.tenant import Role, TenantLimits
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

from loraplex_deployments.bootstrap import ensure_admin_key
from loraplex_deployments.launch import Progress, RunningPlatform, start_platform
from loraplex_deployments.local_cluster import LocalCluster
from loraplex_deployments.ports import free_ports
from loraplex_deployments.replan_setup import TENANT, ReplanBase, ReplanSetup, platform_config

_RECORDED_TIMEOUT_S = 60.0
_SETTLE_TIMEOUT_S = 300.0
_DECISIONS = 1000
_PROMPT_TOKENS, _OUTPUT_TOKENS = (600, 1400), 24
RATES = {"chat": 1.0, "code": 5.0}
"""Requests per second of the demo: not what its replicas were bought for."""
SLO = Slo(ttft_s=3.0, tpot_s=1.0)
"""The demo's."""


def demo_setup(planning_interval_s: float = 300.0) -> ReplanSetup:
    """Two bases on four GPUs, three replicas of the one that few ask for."""
    return ReplanSetup(
        bases=(ReplanBase(name="chat", replicas=3), ReplanBase(name="code", replicas=1)),
        planning=PlanningConfig(
            profiles=("h100-80gb",),
            interval_s=planning_interval_s,
            window_s=2 * planning_interval_s,
            min_requests=100,
            ttft_s=SLO.ttft_s,
            tpot_s=SLO.tpot_s,
            max_evaluations=60,
            max_search_s=60.0,
            reassign_interval_s=0,
        ),
        first_token_deadline_s=3 * SLO.ttft_s,
    )


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
        setup: ReplanSetup,
        platform: RunningPlatform,
        config: PlatformConfig,
        targets: tuple[Target, ...],
        admin_key: str,
        started: contextlib.ExitStack,
    ) -> None:
        """``started`` ends, last first, what was started."""
        self.setup = setup
        self.platform = platform
        self.targets = targets
        self.admin_key = admin_key
        self._config = config
        self._started = started
        self._since_s = time.time()

    @classmethod
    def start(
        cls, say: Progress, *, mode: Mode, setup: ReplanSetup | None = None, plan: Callable[[], Plan] | None = None
    ) -> Self:
        """``mode``: who makes plans, as ``controller.fleet.mode``; ``setup``: None for the demo's; ``plan``: called
        once the adapters are there, for a plan that is then applied. Raises what ``start_platform`` raises."""
        setup = setup or demo_setup()
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loraplex-demo-")))
            say(f"starting {setup.nodes} Ray nodes with {setup.gpus_per_node} GPUs each")
            cluster = LocalCluster(head_cpus=2)
            stack.callback(cluster.close)
            gpus = setup.gpus_per_node
            for name in setup.node_names:
                cluster.add_node(name, num_cpus=2 * gpus, num_gpus=gpus, accelerator=setup.accelerator)
            http_port, grpc_port = free_ports(2)
            config = platform_config(setup, folder, address=cluster.address, ports=(http_port, grpc_port), mode=mode)
            platform = start_platform(config, say)
            stack.callback(platform.stop)
            key = new_key()
            platform.call("ensure_tenant", str(TENANT), TenantLimits())
            platform.call("ensure_key", TENANT, Role.MEMBER, key)
            names = _register_adapters(platform, setup, folder)
            targets = tuple(Target(tenant=str(TENANT), model=name, key=key) for name in names)
            if plan is not None:
                platform.call("apply_plan", plan(), renumber=True)
            say("waiting for the replicas")
            platform.wait_ready()
            _wait_settled(platform)
            return cls(setup, platform, config, targets, ensure_admin_key(platform, config), stack.pop_all())

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

    def set_mode(self, mode: Mode) -> None:
        """Another controller takes over, which makes plans so; replicas and gateways go on."""
        controller = self._config.controller
        fleet = msgspec.structs.replace(controller.fleet, mode=mode)
        self._config = msgspec.structs.replace(
            self._config, controller=msgspec.structs.replace(controller, fleet=fleet)
        )
        self.platform.change_config(self._config)
        _wait_settled(self.platform)

    async def replay(self, trace: list[TraceRequest], *, seed: int) -> list[Sample]:
        """Sends each request at its time. What is recorded from now on is what ``recorded`` reads."""
        self._since_s = time.time()
        http = HttpClient(self.url, connect_timeout_s=10)
        try:
            schedule = plan_replay(trace, assign_targets(trace, self.targets), ReplayConfig())
            models = [load_model_spec(base.model, BaseModelId(base.name)) for base in self.setup.bases]
            prompts = RandomTokens(min(model.vocab_size for model in models), seed=seed)
            return await run_open_loop(schedule, CompletionClient(http, RequestConfig(timeout_s=300)), prompts)
        finally:
            http.close()

    def decisions(self, since_s: float = 0.0) -> tuple[DecisionRecord, ...]:
        """Of the controller, in order, the last thousand from ``since_s`` (Unix seconds) on."""
        found: tuple[DecisionRecord, ...] = self.platform.call("decisions", _DECISIONS)
        return tuple(one for one in reversed(found) if one.at_s >= since_s)

    def recorded(self, num_requests: int) -> Recorded:
        """What was recorded since the last replay began, once it is ``num_requests``. Unavailable when it does not get
        there."""
        active = self.status.active.plan
        task = planner_task(
            self.setup, self._config.controller.fleet.planning, trace_url=self._config.trace_url, since_s=self._since_s
        )
        task = replace(task, current=active)
        problem = problem_for(task, _wait_recorded(task, num_requests))
        plan, attainment = simulated(task.current, problem)
        setting = f"plan {active.version}"
        return Recorded(
            problem=problem,
            in_force=Baseline(
                name="in force", plan=plan, attainment=attainment, setting=setting, tried=1, is_alpaserve=False
            ),
        )


def planner_task(setup: ReplanSetup, planning: PlanningConfig, *, trace_url: str = "", since_s: float = 0.0) -> Task:
    """As the controller asks its planner."""
    return Task(
        trace_url=trace_url,
        since_s=since_s,
        nodes=setup.node_status,
        current=Plan(version=0, groups=()),
        config=planning,
        bases=tuple(base.name for base in setup.bases),
        lora_ranks=setup.lora_rank_of,
    )


def decision_line(one: DecisionRecord) -> str:
    gain = "" if one.predicted_gain is None else f" (predicted gain {one.predicted_gain:.3f})"
    return f"{one.kind}, plan {one.plan_version}: {one.reason}{gain}"


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
                    tenant=str(TENANT),
                    base_model=base,
                    adapter=f"{base}-{numbers.randrange(demo_setup().adapters_per_base)}",
                    prompt_tokens=numbers.randint(*_PROMPT_TOKENS),
                    output_tokens=_OUTPUT_TOKENS,
                )
            )
            at_s += numbers.expovariate(rate)
    return sorted(requests, key=lambda request: request.arrival_s)


def _register_adapters(platform: RunningPlatform, setup: ReplanSetup, folder: Path) -> list[str]:
    names: list[str] = []
    for base in setup.bases:
        spec = load_model_spec(base.model, BaseModelId(base.name))
        manifests = random_manifests(spec, count=setup.adapters_per_base, lora_ranks=setup.lora_ranks)
        for name, manifest in zip(setup.adapter_names[base.name], manifests, strict=True):
            directory = folder / "new-adapter"
            write_random_peft(directory, manifest, spec, seed=len(names))
            _name_base(directory, base.name)
            names.append(name)
            platform.call("ensure_adapter", TENANT, name, str(directory))
            shutil.rmtree(directory)
    return names


def _name_base(directory: Path, base: str) -> None:
    """Two bases have the same shapes: the adapter says which it is for."""
    file = directory / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config | {"base_model_name_or_path": base}), encoding="utf-8")


def _wait_settled(platform: RunningPlatform) -> None:
    """Until the machines are as the plan in force says. Unavailable when they do not get there."""
    deadline_s = time.monotonic() + _SETTLE_TIMEOUT_S
    while time.monotonic() < deadline_s:
        status: FleetStatus = platform.call("fleet_status")
        if status.settled:
            return
        time.sleep(0.2)
    raise Unavailable(f"not settled after {_SETTLE_TIMEOUT_S:.0f} s: {status}")


def _wait_recorded(task: Task, num_requests: int) -> Arrivals:
    deadline_s = time.monotonic() + _RECORDED_TIMEOUT_S
    while time.monotonic() < deadline_s:
        with contextlib.suppress(NotFound):
            found = recent_arrivals(task)
            if len(found) >= num_requests:
                return found
        time.sleep(0.2)
    raise Unavailable(f"fewer than {num_requests} requests were recorded in {_RECORDED_TIMEOUT_S:.0f} s")
