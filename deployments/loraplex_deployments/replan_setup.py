"""What a platform for re-planning is made of, and its config: bases, adapters, nodes, how the planner is asked. Pure.

Called by ``replan_platform``.
"""

import json
from pathlib import Path
from typing import Any

import msgspec
from loraplex.config.platform import PlatformConfig, RayConfig, parse_platform_config
from loraplex.controller.fleet.config import Mode, PlanningConfig
from loraplex.core.fleet import NodeStatus
from loraplex.core.ids import TenantName
from loraplex.cost.profile import CostProfile
from loraplex.simulator.types import Slo

TENANT = TenantName("acme")
_TINY = "random:tiny-llama"
_PROFILE_FILE = "profile.json"


class ReplanBase(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    profile_base: str = "llama3-8b"
    """Its name in the cost profiles."""
    model: str = _TINY
    """Of paced replicas: what clients and intake see."""
    replicas: int = 0
    """At the start, of one GPU each; 0: until a plan says otherwise."""


class ReplanSetup(msgspec.Struct, frozen=True, kw_only=True):
    bases: tuple[ReplanBase, ...]
    planning: PlanningConfig
    """Its ``profiles`` are shipped names or files; ``profile_bases`` follows from ``bases``."""
    factor: float | None = 12.0
    """Replicas take the time of the profiles, so many times slower, and compute nothing, on logical GPUs. None: they
    compute, on the GPUs of this machine, which are those of one node."""
    gpu: str = "h100-80gb"
    """Their type in the profiles."""
    nodes: int = 2
    gpus_per_node: int = 2
    adapters_per_base: int = 3
    lora_ranks: tuple[int, ...] = (16,)
    """Of the adapters of a base, in turn."""
    proxy: str = "haproxy"
    gateways: int = 1
    first_token_deadline_s: float
    """After which the gateway refuses a request."""

    @property
    def paced(self) -> bool:
        return self.factor is not None

    @property
    def executor(self) -> str:
        """What the replicas run, in words."""
        if self.factor is None:
            return ", ".join(base.model for base in self.bases)
        names = ", ".join(dict.fromkeys(base.profile_base for base in self.bases))
        return f"paced: {names} on {', '.join(self.planning.profiles)}, {self.factor:g} times slower"

    @property
    def slo(self) -> Slo:
        return Slo(ttft_s=self.planning.ttft_s, tpot_s=self.planning.tpot_s)

    @property
    def adapter_names(self) -> dict[str, tuple[str, ...]]:
        """By base."""
        return {
            base.name: tuple(f"{base.name}-{index}" for index in range(self.adapters_per_base)) for base in self.bases
        }

    @property
    def lora_rank_of(self) -> dict[str, int]:
        """By ``tenant/name``."""
        ranks = self.lora_ranks
        return {
            f"{TENANT}/{name}": ranks[index % len(ranks)]
            for names in self.adapter_names.values()
            for index, name in enumerate(names)
        }

    @property
    def node_names(self) -> tuple[str, ...]:
        return tuple(f"node-{index}" for index in range(self.nodes))

    @property
    def node_status(self) -> tuple[NodeStatus, ...]:
        """As the planner takes them."""
        return tuple(NodeStatus(name=name, gpu=self.gpu, num_gpus=self.gpus_per_node) for name in self.node_names)

    @property
    def accelerator(self) -> str:
        """Ray's word for ``gpu``."""
        return next((rays for rays, ours in RayConfig().gpu_types.items() if ours == self.gpu), self.gpu)

    def planning_in(self, folder: Path) -> PlanningConfig:
        """With the costs that the replicas have, in one file that is written into ``folder``."""
        joined = CostProfile.joined(CostProfile.load(name) for name in self.planning.profiles)
        file = folder / _PROFILE_FILE
        file.write_bytes((joined if self.factor is None else joined.slowed(self.factor)).to_json())
        names = {base.name: base.profile_base for base in self.bases}
        return msgspec.structs.replace(self.planning, profiles=(str(file),), profile_bases=names)


def platform_config(
    setup: ReplanSetup, folder: Path, *, address: str, ports: tuple[int, int], mode: Mode
) -> PlatformConfig:
    """``folder``: for data and profiles; ``ports``: of HTTP and gRPC."""
    planning = setup.planning_in(folder)
    base: dict[str, Any] = {"num_cpus": 0.5, "num_gpus": 1}
    settings: dict[str, Any] = {
        "data_dir": str(folder),
        "listen": {"http_port": ports[0], "grpc_port": ports[1]},
        "ray": {"address": address, "single_machine": True},
        "serve": {
            "proxy": setup.proxy,
            "gateways": setup.gateways,
            "gateway_resources": {"node:__internal_head__": 0.001},
        },
        "gateway": {"first_token_deadline_s": setup.first_token_deadline_s},
        "traces": {"send_interval_s": 0.5, "write_interval_s": 1.0},
        "controller": {"fleet": {"mode": mode, "planning": msgspec.to_builtins(planning)}},
        "base_models": [
            base | {"id": one.name, "model": one.model, "replicas": one.replicas} | _executor(setup, one, planning)
            for one in setup.bases
        ],
    }
    return parse_platform_config(json.dumps(settings), source="replan")


def _executor(setup: ReplanSetup, base: ReplanBase, planning: PlanningConfig) -> dict[str, Any]:
    if setup.paced:
        return {"paced": {"profile": planning.profiles[0], "base": base.profile_base}}
    return {"executor": {"device": "cuda"}}
