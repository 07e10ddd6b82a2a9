"""The target state of the cluster: groups, their shapes, and what each of them serves."""

from dataclasses import dataclass

from loraplex.core.ids import BaseModelId


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Model-parallel layout of a group: ``tp`` shards times ``pp`` stages."""

    tp: int = 1
    pp: int = 1

    @property
    def num_ranks(self) -> int:
        return self.tp * self.pp


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterShare:
    """An adapter that a group serves. A name, not a version: a plan outlives the upload of a new version."""

    tenant: str | None
    """Owner; None where the trace that was planned for has no tenants."""
    name: str
    weight: float = 1.0
    """Greater than 0. Among replicas that are alike (residency, load) the adapter's requests choose in proportion."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BasePlacement:
    """One base on one group, and the adapters that should be resident there.

    Requests of an adapter go to the replicas that list it; of one that no replica of its base lists, to any of them.
    So empty sets everywhere mean: every replica takes every adapter.
    """

    base_model_id: BaseModelId
    adapters: tuple[AdapterShare, ...] = ()
    arena_share: float = 1.0
    """Of the arena that the weights of the group's bases leave: its part is this over the sum of the group's shares."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlan:
    name: str
    shape: Shape
    bases: tuple[BasePlacement, ...]
    gpu: str = ""
    """GPU type of all its GPUs, e.g. ``h100-80gb``; empty: the fleet has one type."""
    nodes: tuple[str, ...] = ()
    """Node of each rank, ``shape.num_ranks`` of them; empty: left to the actuator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    version: int
    groups: tuple[GroupPlan, ...]
