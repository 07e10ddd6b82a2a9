"""What the controller asks of the machines, and what they tell it: replicas, nodes, and the commands between them.

The controller decides over these values and acts through ``Actuator``; ``loraplex_deployments`` carries it out on Ray,
``loraplex.testing`` in memory.
"""

from dataclasses import dataclass
from typing import Protocol

from loraplex.core.control import ReplicaRoute
from loraplex.core.ids import BaseModelId, ReplicaId
from loraplex.core.plan import AdapterShare, Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseShare:
    """A base of a group that several share."""

    base_model_id: BaseModelId
    arena_share: float = 1.0
    """Of the arena: its part is this over the sum of the group's shares."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaTarget:
    """One base on one group, as it should run. Never changed while it runs: what differs in more than ``adapters`` is
    another replica, with an id of its own."""

    replica_id: ReplicaId
    """Never used twice in the life of a cluster."""
    group: str
    """Replicas of the same group share its GPUs."""
    base_model_id: BaseModelId
    shape: Shape
    gpu: str = ""
    """GPU type; empty: any."""
    nodes: tuple[str, ...] = ()
    """Node name of each rank; empty: any nodes."""
    adapters: tuple[AdapterShare, ...] = ()
    """Made resident before it is ready, as far as they fit."""
    bases: tuple[BaseShare, ...] = ()
    """All of its group, its own among them, when there are several: it leaves the others their part of the memory, and
    runs its steps by turns with them. Empty: it is alone there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStatus:
    """A node that is up."""

    name: str
    gpu: str
    num_gpus: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningReplica:
    """Found on the machines, whoever started it."""

    replica_id: ReplicaId
    group: str
    base_model_id: BaseModelId
    shape: Shape
    gpu: str
    nodes: tuple[str, ...]
    """Where its ranks are."""


class Actuator(Protocol):
    """Every command carries the epoch of the controller that gives it; Unavailable with the code ``superseded`` is
    raised when the machines have heard from a later one. Any call may raise Unavailable."""

    async def nodes(self) -> tuple[NodeStatus, ...]:
        """May lag a node's death by seconds; ``wait_stopped`` does not."""

    async def running(self) -> tuple[RunningReplica, ...]:
        """What a controller adopts when it starts."""

    async def start(self, target: ReplicaTarget, *, epoch: int) -> ReplicaRoute:
        """Its route once its engine is ready and its adapters are warm; adopts it when it runs already. Waits as long
        as the machines have no room for it. Unavailable tells why it died or could not load."""

    async def assign(self, target: ReplicaTarget, *, epoch: int) -> None:
        """Makes the adapters of ``target`` resident on the running replica; those that it no longer lists may go."""

    async def wait_stopped(self, replica_id: ReplicaId) -> str:
        """Returns the reason once the replica is gone, however that came."""

    async def stop(self, replica_id: ReplicaId, *, epoch: int) -> None:
        """Ends it and frees its GPUs. Idempotent."""
