"""What is seen of the replicas, and what follows from it at once.

Owns what was heard and not yet taken, the attempts that failed, why replicas went down, and the decisions that came of
it and are not in the database yet. Puts facts into the roster and has replicas stopped that are down; plans nothing.
Called by ``manager``; hears of the crew.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace

from loraplex.controller.fleet.attempts import Attempts
from loraplex.controller.fleet.config import FleetConfig
from loraplex.controller.fleet.crew import (
    Assigned,
    AssignFailed,
    Crew,
    Down,
    Event,
    Ready,
    Stopped,
    Superseded,
)
from loraplex.controller.fleet.desired import Desired
from loraplex.controller.fleet.nodes import NodeWatch
from loraplex.controller.fleet.roster import Roster
from loraplex.controller.fleet.state import Kind, Replica, ReplicaState
from loraplex.controller.fleet.store import FleetStore, Reason
from loraplex.core.clock import Clock
from loraplex.core.errors import Unavailable
from loraplex.core.fleet import RunningReplica
from loraplex.core.ids import ReplicaId
from loraplex.core.plan import AdapterShare
from loraplex.core.rollout import DecisionKind

logger = logging.getLogger(__name__)


class EventDesk:
    def __init__(
        self,
        roster: Roster,
        crew: Crew,
        store: FleetStore,
        desired: Desired,
        nodes: NodeWatch,
        config: FleetConfig,
        clock: Clock,
    ) -> None:
        self._roster, self._crew, self._store = roster, crew, store
        self._desired, self._nodes, self._config, self._clock = desired, nodes, config, clock
        self._heard: list[Event] = []
        self._notes: list[tuple[DecisionKind, int, Reason]] = []
        self._failures: dict[Kind, tuple[ReplicaId, str]] = {}
        self._starts = Attempts(first_s=config.retry_first_s, max_s=config.retry_max_s)
        self._assigns = Attempts(first_s=config.retry_first_s, max_s=config.retry_max_s)

    def hear(self, event: Event) -> None:
        """Kept until ``take``."""
        self._heard.append(event)

    def take(self) -> bool:
        """All that was heard; whether it was anything. Raises Unavailable (``superseded``)."""
        events, self._heard = self._heard, []
        for event in events:
            if isinstance(event, Superseded):
                raise Unavailable("a later controller commands the machines", code="superseded")
            self._take(event)
        return bool(events)

    async def adopt(self, running: Mapping[ReplicaId, RunningReplica]) -> None:
        """Joins the records with what runs: takes over what is in both, stops or records the rest. Raises StorageFull,
        Unavailable."""
        for replica_id, found in running.items():
            if self._roster.get(replica_id) is None:
                bases = sorted({one.base_model_id for one in running.values() if one.group == found.group})
                await self._roster.adopt(found, tuple(bases))
        for replica in self._roster:
            self._take_over(replica, running.get(replica.target.replica_id))

    async def save(self) -> None:
        """What was seen since the last time. As it stays undone when the database is away, it is done again then."""
        for replica_id in await self._roster.save():
            self._crew.forget(replica_id)
        while self._notes:
            await self._store.decide(*self._notes[0])
            del self._notes[0]

    def plan_changed(self) -> None:
        """Every kind of group may be started at once, as if none had failed."""
        self._starts.clear()

    def start_held_back(self, kind: Kind) -> bool:
        """It failed, and is not to be tried again yet."""
        return self._starts.held_back(kind, self._clock.monotonic_s())

    def start_given_up(self, kind: Kind) -> bool:
        return self._starts.count(kind) >= self._config.max_attempts

    def start_failure(self, kind: Kind) -> str:
        """Why the last start failed; empty: it did not."""
        return self._starts.reason(kind)

    def assign_held_back(self, replica_id: ReplicaId) -> bool:
        """As of starts."""
        return self._assigns.held_back(replica_id, self._clock.monotonic_s())

    def failures(self) -> dict[ReplicaId, str]:
        """Of each kind of group that has a replica down, the last one and why."""
        return dict(self._failures.values())

    def _take(self, event: Event) -> None:
        match event:
            case Ready(replica_id, route):
                replica = self._roster[replica_id]
                if replica.state is ReplicaState.STOPPING:
                    return
                routed = replace(replica, route=route)
                if replica.state is ReplicaState.STARTING:
                    self._roster.put_state(routed, ReplicaState.SERVING)
                    logger.info("replica %s is ready at %s", replica_id, route.address)
                else:
                    self._roster.put(routed)
                self._failures.pop(Kind.of_replica(replica), None)
            case Down(replica_id, reason):
                replica = self._roster[replica_id]
                if replica.state is not ReplicaState.STOPPING:
                    self._note_failure(replica, reason)
                    self._leave(replica)
            case Stopped(replica_id):
                self._roster.remove(replica_id)
            case Assigned(target):
                self._assigns.succeeded(target.replica_id)
                self._put_adapters(target.replica_id, target.adapters)
            case AssignFailed(target, reason):
                self._assigns.failed(target.replica_id, reason, self._clock.monotonic_s())
                if self._assigns.count(target.replica_id) >= self._config.max_attempts:
                    self._assigns.succeeded(target.replica_id)
                    self._put_adapters(target.replica_id, target.adapters)
                    self._note(DecisionKind.NOT_RESIDENT, f"replica {target.replica_id}: {reason}")

    def _take_over(self, replica: Replica, found: RunningReplica | None) -> None:
        replica_id = replica.target.replica_id
        if replica.state is ReplicaState.STOPPING:
            self._crew.stop(replica_id)
        elif found is None:
            if replica.state is not ReplicaState.STARTING:
                self._note(DecisionKind.REPLACED_REPLICA, f"replica {replica_id} was gone when the controller started")
            self._leave(replica)
        else:
            if found.nodes and found.nodes != replica.nodes:
                self._roster.put(replace(replica, nodes=found.nodes))
            if replica.state is ReplicaState.DRAINING:
                self._crew.watch(replica_id)
            else:
                self._crew.start(replica.target)
                if replica.state is ReplicaState.SERVING:
                    # What it lost was routed away first, and may still be there.
                    self._crew.assign(replica.target)

    def _note_failure(self, replica: Replica, reason: str) -> None:
        replica_id, now_s = replica.target.replica_id, self._clock.monotonic_s()
        logger.error("replica %s is down: %s", replica_id, reason)
        if replica.state is ReplicaState.DRAINING:
            return
        kind, ran_s = Kind.of_replica(replica), self._roster.in_state_s(replica_id)
        self._failures[kind] = (replica_id, reason)
        serving = replica.state is ReplicaState.SERVING
        up = {node.name for node in self._nodes.usable(now_s)}
        if serving and ran_s >= self._config.stable_s:
            self._starts.succeeded(kind)
        elif all(node in up for node in replica.nodes or replica.target.nodes):
            self._starts.failed(kind, reason, now_s)
        if serving:
            self._note(DecisionKind.REPLACED_REPLICA, f"replica {replica_id} is down: {reason}")

    def _leave(self, replica: Replica) -> None:
        """No route from now on; its GPUs are free when it is stopped."""
        self._roster.put_state(replica, ReplicaState.STOPPING)
        self._crew.stop(replica.target.replica_id)

    def _put_adapters(self, replica_id: ReplicaId, adapters: tuple[AdapterShare, ...]) -> None:
        replica = self._roster.get(replica_id)
        if replica is not None and replica.state is ReplicaState.SERVING:
            self._roster.put(replace(replica, target=replace(replica.target, adapters=adapters)))

    def _note(self, kind: DecisionKind, reason: str) -> None:
        self._notes.append((kind, self._desired.active.plan.version, Reason(text=reason)))
