"""The target state of the cluster: groups, their shapes, and what each of them serves."""

from dataclasses import dataclass

from loraplex.core.ids import BaseModelId, Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Model-parallel layout of a group: ``tp`` shards times ``pp`` stages."""

    tp: int = 1
    pp: int = 1

    @property
    def num_ranks(self) -> int:
        return self.tp * self.pp


@dataclass(frozen=True, slots=True, kw_only=True)
class BasePlacement:
    """One base on one group, and the adapters that should be resident there."""

    base_model_id: BaseModelId
    adapters: tuple[Digest, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlan:
    name: str
    shape: Shape
    bases: tuple[BasePlacement, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    version: int
    groups: tuple[GroupPlan, ...]
