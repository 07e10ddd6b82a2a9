"""What the controller knows of its replicas, as values: records, the groups that they form, what a base needs.

Kept in the control database by ``store``, decided over by ``diff``.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NamedTuple

from loraplex.core.control import ReplicaRoute
from loraplex.core.fleet import BaseShare, ReplicaTarget
from loraplex.core.ids import BaseModelId
from loraplex.core.model import ModelSpec
from loraplex.core.plan import AdapterShare, GroupPlan, Shape
from loraplex.cost.memory import DEFAULT_MEMORY_FRACTION


class ReplicaState(StrEnum):
    STARTING = "starting"
    """Recorded; whether the machines have begun is not known."""
    SERVING = "serving"
    DRAINING = "draining"
    """Routed, for what runs there alone."""
    STOPPING = "stopping"
    """Not routed; its GPUs are not free yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    target: ReplicaTarget
    """``adapters``: as routed now."""
    state: ReplicaState
    since_s: float
    """Wall clock at which it came into its state."""
    group_bases: tuple[BaseModelId, ...]
    """All bases of its group, also of replicas that are down."""
    planned_nodes: tuple[str, ...] = ()
    """As its plan said, when that could not be had: a group that was started elsewhere stays there."""
    nodes: tuple[str, ...] = ()
    """Where its ranks are; empty: not known."""
    route: ReplicaRoute | None = None
    """Since it was ready."""
    release: str = ""
    """As ``FleetBase.release`` when it was started; empty: not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetBase:
    """What the config says of a base, beyond plans."""

    base_model_id: BaseModelId
    gpus_per_rank: float = 1.0
    """0: it runs on CPUs, and the number of its replicas is bounded by the plan alone."""
    shape: Shape = field(default_factory=Shape)
    """Of the one replica that comes when it has no group in the plan and a request asks for it."""
    gpu: str = ""
    release: str = ""
    """Build and settings that its replicas run; those of another are replaced one by one."""
    model: ModelSpec | None = None
    """What a group's shape has to divide. None: replicas that compute nothing take any shape."""
    itemsize: int = 2
    """Bytes of a weight and of an element of KV."""
    memory_fraction: float = DEFAULT_MEMORY_FRACTION
    """Of a GPU, as its executor's."""


class Kind(NamedTuple):
    """What groups are told apart by when they are matched; and what fails together when it cannot be started."""

    gpu: str
    shape: Shape
    bases: frozenset[BaseModelId]

    @classmethod
    def of(cls, group: GroupPlan) -> "Kind":
        return cls(group.gpu, group.shape, frozenset(placed.base_model_id for placed in group.bases))

    @classmethod
    def of_replica(cls, replica: Replica) -> "Kind":
        return cls(replica.target.gpu, replica.target.shape, frozenset(replica.group_bases))


@dataclass(frozen=True, slots=True)
class RunningGroup:
    """The replicas of one group; at least one."""

    name: str
    members: tuple[Replica, ...]

    @property
    def first(self) -> Replica:
        return self.members[0]

    @property
    def bases(self) -> frozenset[BaseModelId]:
        return frozenset(self.first.group_bases)

    @property
    def base_shares(self) -> tuple[BaseShare, ...]:
        """Empty: it has one base, or they are not known."""
        return next((member.target.bases for member in self.members if member.target.bases), ())

    @property
    def shape(self) -> Shape:
        return self.first.target.shape

    @property
    def gpu(self) -> str:
        return self.first.target.gpu

    @property
    def nodes(self) -> tuple[str, ...]:
        """Where it is, or where it was sent; empty: anywhere."""
        return next((member.nodes for member in self.members if member.nodes), self.first.target.nodes)

    @property
    def stays(self) -> bool:
        """Starts or serves."""
        return any(member.state in (ReplicaState.STARTING, ReplicaState.SERVING) for member in self.members)

    @property
    def serves(self) -> bool:
        """With all its bases."""
        serving = {m.target.base_model_id for m in self.members if m.state is ReplicaState.SERVING}
        return serving == self.bases

    @property
    def drains(self) -> bool:
        """And could be taken back."""
        return all(member.state is ReplicaState.DRAINING for member in self.members)


def running_groups(replicas: Iterable[Replica]) -> tuple[RunningGroup, ...]:
    """In the order of their first replica."""
    found: dict[str, list[Replica]] = {}
    for replica in replicas:
        found.setdefault(replica.target.group, []).append(replica)
    return tuple(RunningGroup(name, tuple(members)) for name, members in found.items())


def num_gpus(bases: Iterable[BaseModelId], known: Mapping[BaseModelId, FleetBase]) -> float:
    """Of one rank of a group with these bases: they share its GPUs."""
    return max((known[base].gpus_per_rank for base in bases if base in known), default=1.0)


def outdated_groups(replicas: Iterable[Replica], bases: Mapping[BaseModelId, FleetBase]) -> frozenset[str]:
    """Names of those with a replica of another release than its base has now."""
    return frozenset(
        replica.target.group
        for replica in replicas
        if replica.target.base_model_id in bases and replica.release != bases[replica.target.base_model_id].release
    )


def base_shares(group: GroupPlan) -> tuple[BaseShare, ...]:
    """As its replicas are told; empty for a group of one base."""
    if len(group.bases) < 2:
        return ()
    return tuple(BaseShare(base_model_id=one.base_model_id, arena_share=one.arena_share) for one in group.bases)


AdapterKey = tuple[str | None, str]
"""Tenant and name."""


def adapter_keys(shares: Sequence[AdapterShare]) -> frozenset[AdapterKey]:
    return frozenset((share.tenant, share.name) for share in shares)


def routes_of(replicas: Iterable[Replica]) -> tuple[ReplicaRoute, ...]:
    """The route table."""
    return tuple(
        replace(
            replica.route,
            group=replica.target.group,
            shape=replica.target.shape,
            gpu=replica.route.gpu or replica.target.gpu,
            adapters=replica.target.adapters,
            draining=replica.state is ReplicaState.DRAINING,
        )
        for replica in replicas
        if replica.route is not None and replica.state in (ReplicaState.SERVING, ReplicaState.DRAINING)
    )
