"""The replicas that this controller answers for, as it knows them now, and what of that the database has yet to learn.

Owns the records in memory. Facts are put here when they are seen and saved after; intents are saved first, through the
other methods. Decides nothing. Called by ``manager`` and ``events``.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from loraplex.controller.fleet.diff import StartReplicas
from loraplex.controller.fleet.state import FleetBase, Replica, ReplicaState, outdated_groups
from loraplex.controller.fleet.store import FleetStore
from loraplex.core.clock import Clock
from loraplex.core.fleet import RunningReplica
from loraplex.core.ids import BaseModelId, ReplicaId


class Roster:
    """Methods that wait raise StorageFull and Unavailable; nothing is changed here then."""

    def __init__(self, store: FleetStore, clock: Clock, bases: Mapping[BaseModelId, FleetBase]) -> None:
        self._store, self._clock = store, clock
        self._bases = bases
        self._replicas: dict[ReplicaId, Replica] = {}
        self._began_s: dict[ReplicaId, float] = {}
        self._unsaved: set[ReplicaId] = set()
        self._removed: set[ReplicaId] = set()

    def take(self, stored: Sequence[Replica]) -> None:
        """What the last controller left."""
        for replica in stored:
            self._keep(replica)

    def __iter__(self) -> Iterator[Replica]:
        return iter(tuple(self._replicas.values()))

    def __getitem__(self, replica_id: ReplicaId) -> Replica:
        return self._replicas[replica_id]

    def get(self, replica_id: ReplicaId) -> Replica | None:
        return self._replicas.get(replica_id)

    def in_state_s(self, replica_id: ReplicaId) -> float:
        """Seconds since it came into its state, as far as this process knows."""
        return self._clock.monotonic_s() - self._began_s[replica_id]

    def outdated_groups(self) -> frozenset[str]:
        """Of another release than their base has now."""
        return outdated_groups(self, self._bases)

    def put(self, replica: Replica) -> None:
        """A fact: to be saved."""
        self._replicas[replica.target.replica_id] = replica
        self._unsaved.add(replica.target.replica_id)

    def put_state(self, replica: Replica, state: ReplicaState) -> None:
        """Likewise: ``replica`` has come into ``state``."""
        self.put(replace(replica, state=state, since_s=self._clock.wall_s()))
        self._began_s[replica.target.replica_id] = self._clock.monotonic_s()

    def remove(self, replica_id: ReplicaId) -> None:
        """Likewise: it is stopped. It stays here until that is saved."""
        self._removed.add(replica_id)

    async def save(self) -> tuple[ReplicaId, ...]:
        """All facts; those of a call that fails are saved by the next. Returns the replicas that are gone now."""
        unsaved = [self._replicas[one] for one in self._unsaved if one in self._replicas and one not in self._removed]
        if unsaved:
            await self._store.put(unsaved)
            self._unsaved -= {replica.target.replica_id for replica in unsaved}
        gone = tuple(sorted(self._removed))
        if gone:
            await self._store.remove(gone)
            for replica_id in gone:
                self._replicas.pop(replica_id, None)
                self._began_s.pop(replica_id, None)
            self._removed -= set(gone)
            self._unsaved -= set(gone)
        return gone

    async def begin(self, action: StartReplicas) -> tuple[Replica, ...]:
        """Records replicas that are about to be started."""
        made = await self._store.begin(
            action.plan,
            action.bases,
            group=action.group,
            nodes=action.nodes,
            planned_nodes=action.planned_nodes,
            releases={base.base_model_id: base.release for base in self._bases.values()},
        )
        for replica in made:
            self._keep(replica)
        return made

    async def adopt(self, found: RunningReplica, group_bases: tuple[BaseModelId, ...]) -> None:
        """Records a replica that runs without a record."""
        self._keep(await self._store.adopt(found, group_bases))

    async def replace(self, replica: Replica) -> None:
        await self._store.put([replica])
        self._replicas[replica.target.replica_id] = replica

    async def set_states(self, replica_ids: Sequence[ReplicaId], state: ReplicaState) -> None:
        for stored in await self._store.set_states(replica_ids, state):
            # What was seen and is not saved yet is here alone.
            self._keep(replace(self._replicas[stored.target.replica_id], state=state, since_s=stored.since_s))

    def validate(self) -> None:
        """Asserts the invariants."""
        for replica_id, replica in self._replicas.items():
            assert replica.target.replica_id == replica_id
            assert replica.state is not ReplicaState.SERVING or replica.route is not None
        assert self._replicas.keys() == self._began_s.keys()
        assert self._unsaved <= self._replicas.keys()
        assert self._removed <= self._replicas.keys()

    def _keep(self, replica: Replica) -> None:
        """As it was recorded."""
        self._replicas[replica.target.replica_id] = replica
        self._began_s[replica.target.replica_id] = self._clock.monotonic_s()
