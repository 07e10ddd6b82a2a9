"""An ``Actuator`` in memory: nodes with GPUs, replicas that take a while to start, and whatever tests want to go wrong.

It outlives the controllers that command it, as machines do, and checks what it is told: no GPU twice, no replica id
twice, nothing from a controller that was replaced.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace

from loraplex.core.control import ReplicaRoute
from loraplex.core.errors import Unavailable
from loraplex.core.fleet import NodeStatus, ReplicaTarget, RunningReplica
from loraplex.core.ids import BaseModelId, ReplicaId
from loraplex.core.plan import AdapterShare

Hook = Callable[[str], Awaitable[None]]
"""Awaited before and after each call, with its name: where a test lets a controller die, or machines hang."""


async def _nothing(call: str) -> None: ...


@dataclass(slots=True)
class _Machine:
    target: ReplicaTarget
    nodes: tuple[str, ...]
    ready: bool = False
    num_requests: int = 0
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    reason: str = ""


class FakeActuator:
    def __init__(self, nodes: Iterable[NodeStatus], *, start_s: float = 0.0, gpus_per_rank: float = 1.0) -> None:
        self._nodes = {node.name: node for node in nodes}
        self._machines: dict[ReplicaId, _Machine] = {}
        self._start_s, self._gpus_per_rank = start_s, gpus_per_rank
        self._changed = asyncio.Event()
        self._epoch = 0
        self.used_ids: set[ReplicaId] = set()
        self.cannot_load: Callable[[ReplicaTarget], str | None] = lambda target: None
        """Why a replica dies while it starts; None: it does not."""
        self.cannot_assign: Callable[[ReplicaTarget], str | None] = lambda target: None
        self.hook: Hook = _nothing
        self.commands: list[tuple[str, ReplicaId]] = []

    async def nodes(self) -> tuple[NodeStatus, ...]:
        await self.hook("nodes")
        return tuple(self._nodes.values())

    async def running(self) -> tuple[RunningReplica, ...]:
        await self.hook("running")
        return tuple(
            RunningReplica(
                replica_id=replica_id,
                group=machine.target.group,
                base_model_id=machine.target.base_model_id,
                shape=machine.target.shape,
                gpu=machine.target.gpu,
                nodes=machine.nodes,
            )
            for replica_id, machine in self._machines.items()
        )

    async def start(self, target: ReplicaTarget, *, epoch: int) -> ReplicaRoute:
        await self.hook("start")
        self._check(epoch)
        self.commands.append(("start", target.replica_id))
        machine = self._machines.get(target.replica_id)
        if machine is None:
            assert target.replica_id not in self.used_ids, f"{target.replica_id} is used twice"
            self.used_ids.add(target.replica_id)
            machine = await self._placed(target, epoch)
        if not machine.ready:
            await asyncio.sleep(self._start_s)
            reason = self.cannot_load(target)
            if reason is not None:
                self.kill(target.replica_id, reason)
            if machine.stopped.is_set():
                raise Unavailable(machine.reason)
            machine.ready = True
        await self.hook("started")
        return ReplicaRoute(
            replica_id=target.replica_id, base_model_id=target.base_model_id, address=f"fake:{target.replica_id}"
        )

    async def assign(self, target: ReplicaTarget, *, epoch: int) -> None:
        await self.hook("assign")
        self._check(epoch)
        machine = self._machines.get(target.replica_id)
        reason = self.cannot_assign(target)
        if machine is None or reason is not None:
            raise Unavailable(reason or f"{target.replica_id} does not run")
        self.commands.append(("assign", target.replica_id))
        machine.target = replace(machine.target, adapters=target.adapters)
        await self.hook("assigned")

    async def wait_stopped(self, replica_id: ReplicaId) -> str:
        await self.hook("wait_stopped")
        machine = self._machines.get(replica_id)
        if machine is None:
            return "it is not there"
        await machine.stopped.wait()
        return machine.reason

    async def stop(self, replica_id: ReplicaId, *, epoch: int) -> None:
        await self.hook("stop")
        self._check(epoch)
        self.commands.append(("stop", replica_id))
        # A start that is on its way must not come later than its stop.
        self.used_ids.add(replica_id)
        self.kill(replica_id, "stopped")
        await self.hook("stopped")

    async def load(self, replica_id: ReplicaId) -> int:
        """What ``FleetManager`` takes as ``loads``."""
        if replica_id not in self._machines:
            raise Unavailable(f"{replica_id} does not run")
        return self._machines[replica_id].num_requests

    def set_load(self, replica_id: ReplicaId, num_requests: int) -> None:
        self._machines[replica_id].num_requests = num_requests

    def kill(self, replica_id: ReplicaId, reason: str = "killed") -> None:
        machine = self._machines.pop(replica_id, None)
        if machine is not None:
            machine.reason = reason
            machine.stopped.set()
            self._tell()

    def add_node(self, node: NodeStatus) -> None:
        self._nodes[node.name] = node
        self._tell()

    def remove_node(self, name: str) -> None:
        """With all that runs there."""
        del self._nodes[name]
        for replica_id, machine in list(self._machines.items()):
            if name in machine.nodes:
                self.kill(replica_id, f"node {name} is gone")

    def forget_epoch(self) -> None:
        """As when a new control database counts from the beginning."""
        self._epoch = 0

    def resident(self, replica_id: ReplicaId) -> tuple[AdapterShare, ...]:
        return self._machines[replica_id].target.adapters

    def up(self) -> dict[ReplicaId, ReplicaTarget]:
        """Ready replicas; ``nodes`` where they are."""
        return {
            replica_id: replace(machine.target, nodes=machine.nodes)
            for replica_id, machine in self._machines.items()
            if machine.ready
        }

    def num_serving(self, base: BaseModelId) -> int:
        return sum(target.base_model_id == base for target in self.up().values())

    def validate(self) -> None:
        """Asserts that no node gives more GPUs than it has."""
        for name, node in self._nodes.items():
            assert self._used()[name] <= node.num_gpus, f"node {name} gives more GPUs than it has"

    async def _placed(self, target: ReplicaTarget, epoch: int) -> _Machine:
        """Waits for room, as a placement group does; beside the other replicas of its group there is some."""
        while True:
            self._check(epoch)
            nodes = self._room_for(target)
            if nodes is not None:
                break
            await self._changed.wait()
        machine = self._machines[target.replica_id] = _Machine(target, nodes)
        return machine

    def _room_for(self, target: ReplicaTarget) -> tuple[str, ...] | None:
        for machine in self._machines.values():
            if machine.target.group == target.group:
                return machine.nodes
        used = self._used()
        ranks = target.shape.num_ranks
        choices = [target.nodes] if target.nodes else [(name,) * ranks for name in self._nodes]
        for nodes in choices:
            counts = Counter(nodes)
            if all(
                name in self._nodes
                and (not target.gpu or self._nodes[name].gpu == target.gpu)
                and used[name] + count * self._gpus_per_rank <= self._nodes[name].num_gpus
                for name, count in counts.items()
            ):
                return nodes
        return None

    def _used(self) -> Counter[str]:
        """GPUs by node; a group's replicas share theirs."""
        groups = {machine.target.group: machine.nodes for machine in self._machines.values()}
        return Counter({n: c * self._gpus_per_rank for n, c in Counter(sum(groups.values(), ())).items()})

    def _check(self, epoch: int) -> None:
        if epoch < self._epoch:
            raise Unavailable(f"a controller of epoch {self._epoch} commands these machines", code="superseded")
        self._epoch = epoch

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
