"""The fleet file: nodes, cost profiles, adapter ranks. Owns its format; the commands read the bytes.

profiles: [h100-80gb]             # shipped names, or files of `loraplex profile`
nodes:
  - {name: h100, gpu: h100-80gb, gpus: 8, count: 8}
bases: {llama-8b: llama3-8b}      # name in traces -> name in the profiles, where they differ
adapters: {lora_rank: 16, ranks: {"acme/support": 64}}
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated, Self

import msgspec

from loraplex.core.errors import BadConfig, InvalidInput
from loraplex.core.ids import BaseModelId
from loraplex.core.plan import Plan
from loraplex.core.plan_check import check_form, refused
from loraplex.cost.profile import CostProfile
from loraplex.engine import EngineConfig
from loraplex.planner.problem import Node
from loraplex.simulator.types import AdapterSize, CostKey, ReplicaCost
from loraplex.traces.arrivals import AdapterName

_Positive = Annotated[int, msgspec.Meta(ge=1)]


class NodeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    gpu: str
    gpus: _Positive
    count: _Positive = 1
    """Nodes alike: ``name-0``, ``name-1``, ..."""


class AdapterRanks(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    lora_rank: _Positive | None = None
    """Of adapters that ``ranks`` does not name; None: these are unknown, an error."""
    ranks: dict[str, _Positive] = {}
    """``tenant/name``, or ``name`` where the trace has no tenants."""


class Fleet(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    profiles: tuple[str, ...]
    nodes: tuple[NodeConfig, ...]
    bases: dict[str, str] = {}
    adapters: AdapterRanks = AdapterRanks(lora_rank=16)
    engine: EngineConfig = msgspec.field(default_factory=EngineConfig)
    turn_s: Annotated[float, msgspec.Meta(ge=0)] = 8e-4
    """What bases that share a group lose whenever another one's turn begins: ``model_runner.turns`` measures it (0.8 ms
    with an 8B on two H100s)."""

    @classmethod
    def parse(cls, data: bytes, *, where: str) -> Self:
        """BadConfig: one line with file and key."""
        try:
            fleet = msgspec.yaml.decode(data, type=cls)
        except msgspec.DecodeError as error:
            raise BadConfig(f"{where}: not a fleet: {error}") from error
        names = [node.name for node in fleet.all_nodes()]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise BadConfig(f"{where}: nodes: {twice!r} comes twice", param="nodes")
        if not names:
            raise BadConfig(f"{where}: nodes: there are none", param="nodes")
        return fleet

    def all_nodes(self) -> tuple[Node, ...]:
        return tuple(
            Node(name=node.name if node.count == 1 else f"{node.name}-{index}", gpu=node.gpu, num_gpus=node.gpus)
            for node in self.nodes
            for index in range(node.count)
        )

    def costs(self, bases: Iterable[str]) -> dict[CostKey, ReplicaCost]:
        """Of every shape that the profiles know. BadConfig naming a GPU type or base that they do not."""
        profile = CostProfile.joined([CostProfile.load(name) for name in self.profiles])
        found: dict[CostKey, ReplicaCost] = {}
        for base in bases:
            known = self.bases.get(base, base)
            renamed = profile if known == base else profile.renamed(known, BaseModelId(base))
            for gpu in dict.fromkeys(node.gpu for node in self.nodes):
                for shape in renamed.shapes(base, gpu):
                    key = CostKey(gpu=gpu, base_model_id=BaseModelId(base), shape=shape)
                    found[key] = ReplicaCost.of(renamed, key, self.engine)
        return found

    def size_of(self, tenant: str | None, name: str) -> AdapterSize:
        """InvalidInput naming an adapter whose rank nothing says."""
        label = name if tenant is None else f"{tenant}/{name}"
        rank = self.adapters.ranks.get(label, self.adapters.lora_rank)
        if rank is None:
            raise InvalidInput(f"unknown adapter {label}: the fleet gives neither its rank nor a lora_rank for all")
        return AdapterSize(lora_rank=rank)

    def sizes(self, adapters: Iterable[AdapterName]) -> tuple[AdapterSize, ...]:
        return tuple(self.size_of(adapter.tenant, adapter.name) for adapter in adapters)

    def fitting(self, plan: Plan, *, where: str) -> Plan:
        """The plan, its GPU types filled in where the fleet has but one. InvalidInput naming the group that is wrong in
        itself or has GPUs or nodes which the fleet does not have."""
        try:
            check_form(plan)
            types = tuple(dict.fromkeys(node.gpu for node in self.nodes))
            if len(types) == 1:
                groups = tuple(replace(group, gpu=group.gpu or types[0]) for group in plan.groups)
                plan = replace(plan, groups=groups)
            self._check_gpus(plan)
        except InvalidInput as error:
            raise InvalidInput(f"{where}: {error.message}", param="plan") from error
        return plan

    def _check_gpus(self, plan: Plan) -> None:
        free = {node.name: node.num_gpus for node in self.all_nodes()}
        gpu_of = {node.name: node.gpu for node in self.all_nodes()}
        left = Counter[str]()
        for node in self.all_nodes():
            left[node.gpu] += node.num_gpus
        for group in plan.groups:
            if not group.gpu:
                raise refused(group, f"its type of GPU is not given, and the fleet has {', '.join(left)}")
            if group.gpu not in left:
                raise refused(group, f"the fleet has no GPU of type {group.gpu}")
            for name in group.nodes:
                if name not in free:
                    raise refused(group, f"the fleet has no node {name}")
                if gpu_of[name] != group.gpu:
                    raise refused(group, f"node {name} has GPUs of type {gpu_of[name]}, not {group.gpu}")
                free[name] -= 1
                if free[name] < 0:
                    raise refused(group, f"node {name} has no GPU left for it")
        for gpu, there in left.items():
            wanted = sum(group.shape.num_ranks for group in plan.groups if group.gpu == gpu)
            if wanted > there:
                raise InvalidInput(f"the groups need {wanted} GPUs of type {gpu}, the fleet has {there}")
