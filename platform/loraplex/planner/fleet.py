"""The fleet file: nodes, cost profiles, adapter ranks. Owns its format; the commands read the bytes.

profiles: [h100-80gb]             # shipped names, or files of `loraplex profile`
nodes:
  - {name: h100, gpu: h100-80gb, gpus: 8, count: 8}
bases: {llama-8b: llama3-8b}      # name in traces -> name in the profiles, where they differ
adapters: {lora_rank: 16, ranks: {"acme/support": 64}}
"""

from collections.abc import Iterable
from typing import Annotated, Self

import msgspec

from loraplex.core.errors import BadConfig, InvalidInput
from loraplex.core.ids import BaseModelId
from loraplex.core.plan import Plan
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

    def check(self, plan: Plan, *, where: str) -> None:
        """InvalidInput naming the group that has GPUs or nodes which the fleet does not have."""
        free = {node.name: node.num_gpus for node in self.all_nodes()}
        gpu_of = {node.name: node.gpu for node in self.all_nodes()}
        for group in plan.groups:
            if group.gpu and group.gpu not in gpu_of.values():
                raise InvalidInput(
                    f"{where}: group {group.name}: the fleet has no GPU of type {group.gpu}", param="plan"
                )
            for node in group.nodes:
                if node not in free:
                    raise InvalidInput(f"{where}: group {group.name}: the fleet has no node {node}", param="plan")
                free[node] -= 1
                if free[node] < 0:
                    raise InvalidInput(f"{where}: group {group.name}: node {node} has no GPU left for it", param="plan")
        wanted, there = sum(group.shape.num_ranks for group in plan.groups), sum(n.num_gpus for n in self.all_nodes())
        if wanted > there:
            raise InvalidInput(f"{where}: the groups need {wanted} GPUs, the fleet has {there}", param="plan")
