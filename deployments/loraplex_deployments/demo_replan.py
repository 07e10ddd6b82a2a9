"""The whole loop on one machine: traffic is recorded, the controller plans from it, the cluster changes, attainment
rises. ``make demo-replan`` runs it; it prints attainment before and after.

Two bases on four logical GPUs of two Ray nodes, three replicas of the one that few ask for. Gateway, router, engine,
controller and planner are the real ones; the replicas take the time of a slowed H100 and compute nothing.
"""

import asyncio
import contextlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
from loraplex.bench.peft_files import write_random_peft
from loraplex.bench.random_adapters import random_manifests
from loraplex.config.platform import PlatformConfig, parse_platform_config
from loraplex.core.errors import Unavailable
from loraplex.core.ids import BaseModelId, TenantName
from loraplex.core.rollout import DecisionRecord, FleetStatus
from loraplex.core.tenant import Role, TenantLimits
from loraplex.cost.profile import CostProfile
from loraplex.loadgen.completion import CompletionClient, Sample
from loraplex.loadgen.config import ReplayConfig, RequestConfig
from loraplex.loadgen.http_client import HttpClient
from loraplex.loadgen.open_loop import run_open_loop
from loraplex.loadgen.outcomes import Outcomes, attainment
from loraplex.loadgen.prompts import RandomTokens
from loraplex.loadgen.schedule import plan_replay
from loraplex.loadgen.targets import Target, assign_targets
from loraplex.model_runner.build import load_model_spec
from loraplex.simulator.types import Slo
from loraplex.tenancy.keys import new_key
from loraplex.traces.arrivals import TraceRequest

from loraplex_deployments.bench_platform import free_ports
from loraplex_deployments.launch import RunningPlatform, start_platform
from loraplex_deployments.local_cluster import LocalCluster

_MODEL = "random:tiny-llama"
_PROFILE, _PROFILE_BASE, _FACTOR = "h100-80gb", "llama3-8b", 12.0
_TENANT = TenantName("acme")
_REPLICAS = {"chat": 3, "code": 1}
_RATES = {"chat": 1.0, "code": 5.0}
"""Requests per second: not what the replicas were bought for."""
_ADAPTERS_PER_BASE = 3
_PROMPT_TOKENS, _OUTPUT_TOKENS = (600, 1400), 24
_DURATION_S = 40.0
_PLAN_TIMEOUT_S = 180.0
SLO = Slo(ttft_s=3.0, tpot_s=1.0)


class ReplanDemoResult(msgspec.Struct, frozen=True, kw_only=True):
    executor: str
    requests: int
    """Of the trace, which is replayed before and after."""
    attainment_before: float
    attainment_after: float
    failed_before: int
    """Refused because no first token would have come in time, as those after."""
    failed_after: int
    groups_before: tuple[str, ...]
    """Of one replica each: base and shape."""
    groups_after: tuple[str, ...]
    decisions: tuple[str, ...]
    """Of the controller, in order."""


def run_replan_demo() -> ReplanDemoResult:
    """Unavailable when the controller finds no better plan in time."""
    with _platform() as (platform, targets):
        trace = _trace()
        _say(f"replaying {len(trace)} requests over {_DURATION_S:.0f} s: {_RATES}")
        groups_before = _groups(platform.call("fleet_status"))
        before = asyncio.run(_replay(platform.http_url, trace, targets, seed=1))
        _say(f"attainment {_attainment(before):.3f} with {', '.join(groups_before)}; the controller plans")
        status = _wait_planned(platform)
        groups_after = _groups(status)
        _say(f"plan {status.active.plan.version} is in force: {', '.join(groups_after)}; replaying again")
        after = asyncio.run(_replay(platform.http_url, trace, targets, seed=2))
        decisions: tuple[DecisionRecord, ...] = platform.call("decisions", 20)
        return ReplanDemoResult(
            executor=f"paced: {_PROFILE_BASE} on {_PROFILE}, {_FACTOR:g} times slower",
            requests=len(trace),
            attainment_before=_attainment(before),
            attainment_after=_attainment(after),
            failed_before=sum(sample.error is not None for sample in before),
            failed_after=sum(sample.error is not None for sample in after),
            groups_before=groups_before,
            groups_after=groups_after,
            decisions=tuple(
                f"{one.kind}, plan {one.plan_version}: {one.reason}"
                + ("" if one.predicted_gain is None else f" (predicted gain {one.predicted_gain:.3f})")
                for one in reversed(decisions)
            ),
        )


@contextlib.contextmanager
def _platform() -> Iterator[tuple[RunningPlatform, tuple[Target, ...]]]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loraplex-demo-")))
        _say("starting two Ray nodes with two logical GPUs each")
        cluster = LocalCluster(head_cpus=2)
        stack.callback(cluster.close)
        for name in ("node-0", "node-1"):
            cluster.add_node(name, num_cpus=2, num_gpus=2, accelerator="H100")
        platform = start_platform(_config(folder, cluster.address), _say)
        stack.callback(platform.stop)
        key = new_key()
        platform.call("ensure_tenant", str(_TENANT), TenantLimits())
        platform.call("ensure_key", _TENANT, Role.MEMBER, key)
        names = _register_adapters(platform, folder)
        _say("waiting for the replicas")
        platform.wait_ready()
        while not platform.call("fleet_status").settled:
            time.sleep(0.2)
        yield platform, tuple(Target(tenant=str(_TENANT), model=name, key=key) for name in names)


def _config(folder: Path, address: str) -> PlatformConfig:
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
                "mode": "auto",
                "planning": {
                    "profiles": [str(profile)],
                    "profile_bases": dict.fromkeys(_REPLICAS, _PROFILE_BASE),
                    "interval_s": _DURATION_S + 20,
                    "window_s": 2 * _DURATION_S + 40,
                    "min_requests": 100,
                    "ttft_s": SLO.ttft_s,
                    "tpot_s": SLO.tpot_s,
                    "max_evaluations": 60,
                    "max_search_s": 15.0,
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
        manifests = random_manifests(spec, count=_ADAPTERS_PER_BASE, lora_ranks=(16,))
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


def _trace() -> list[TraceRequest]:
    numbers = random.Random(7)
    requests = []
    for base, rate in _RATES.items():
        at_s = numbers.expovariate(rate)
        while at_s < _DURATION_S:
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


async def _replay(url: str, trace: list[TraceRequest], targets: tuple[Target, ...], *, seed: int) -> list[Sample]:
    http = HttpClient(url, connect_timeout_s=10)
    try:
        schedule = plan_replay(trace, assign_targets(trace, targets), ReplayConfig())
        prompts = RandomTokens(load_model_spec(_MODEL, BaseModelId("demo")).vocab_size, seed=seed)
        return await run_open_loop(schedule, CompletionClient(http, RequestConfig(timeout_s=120)), prompts)
    finally:
        http.close()


def _attainment(samples: list[Sample]) -> float:
    found = attainment(Outcomes.of_samples(samples), SLO).attainment
    assert found is not None, "nothing was sent"
    return found


def _wait_planned(platform: RunningPlatform) -> FleetStatus:
    deadline_s = time.monotonic() + _PLAN_TIMEOUT_S
    while time.monotonic() < deadline_s:
        status: FleetStatus = platform.call("fleet_status")
        if status.active.source == "planner" and status.settled:
            return status
        time.sleep(0.5)
    raise Unavailable(
        f"no plan of the planner is in force after {_PLAN_TIMEOUT_S:.0f} s: {platform.call('decisions', 5)}"
    )


def _groups(status: FleetStatus) -> tuple[str, ...]:
    return tuple(
        sorted(f"{'+'.join(group.bases)} on tp {group.shape.tp} x pp {group.shape.pp}" for group in status.groups)
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    with contextlib.redirect_stdout(sys.stderr):  # Ray prints there
        result = run_replan_demo()
    print(msgspec.json.format(msgspec.json.encode(result)).decode())
    sys.exit(result.attainment_after <= result.attainment_before)


if __name__ == "__main__":
    main()
