"""What the fleet manager must not forget, one transaction per method, in the control database's own thread.

The database's epoch fences every write: a controller that was replaced gets Unavailable with the code ``superseded``.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from sqlalchemy.orm import Session

from loraplex.controller.fleet.rows import FleetRows
from loraplex.controller.fleet.state import Replica, ReplicaState, base_shares
from loraplex.core.clock import Clock
from loraplex.core.errors import Conflict, InvalidInput
from loraplex.core.fleet import ReplicaTarget, RunningReplica
from loraplex.core.ids import BaseModelId, ReplicaId
from loraplex.core.plan import GroupPlan, Plan
from loraplex.core.rollout import DecisionKind, DecisionRecord, PlanRecord, PlanState

R = TypeVar("R")
_TRAILING_NUMBER = re.compile(r"(\d+)$")


class Transactions(Protocol):
    """``CatalogThread`` has them. Both raise StorageFull and Unavailable."""

    async def read_session(self, call: Callable[[Session], R]) -> R: ...

    async def write_session(self, call: Callable[[Session], R]) -> R:
        """Committed when ``call`` returns, and only by the controller whose epoch is the newest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFleet:
    replicas: tuple[Replica, ...]
    active: PlanRecord | None
    """None: the config's plan is in force."""
    assigned: Plan | None
    """``active`` with its adapters as they were moved since."""
    woken: Mapping[BaseModelId, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Of a decision that is recorded with what it does."""

    text: str
    attainment_before: float | None = None
    predicted_gain: float | None = None


_HIGHEST_VERSION = 2_000_000_000
"""That an administrator may give: those that come after it still fit 31 bits."""


class FleetStore:
    def __init__(self, transactions: Transactions, clock: Clock, *, epoch: int) -> None:
        self.epoch = epoch
        self._transactions, self._clock = transactions, clock
        self._rows = FleetRows()

    async def load(self) -> StoredFleet:
        def call(session: Session) -> StoredFleet:
            version = self._rows.active_version(session)
            return StoredFleet(
                replicas=self._rows.replicas(session),
                active=self._rows.plan(session, version) if version else None,
                assigned=self._rows.assigned(session, version) if version else None,
                woken=self._rows.woken(session),
            )

        return await self._transactions.read_session(call)

    async def begin(
        self,
        plan: GroupPlan,
        bases: Sequence[BaseModelId],
        *,
        group: str,
        nodes: tuple[str, ...],
        planned_nodes: tuple[str, ...],
        releases: Mapping[BaseModelId, str],
    ) -> tuple[Replica, ...]:
        """Records replicas that are about to be started, with new ids; ``group`` empty: as a new group. ``releases``:
        of bases of the config."""

        def call(session: Session) -> tuple[Replica, ...]:
            name = group or self._rows.next_group(session)
            made = []
            for placed in plan.bases:
                if placed.base_model_id not in bases:
                    continue
                number, replica_id = self._rows.next_replica(session, placed.base_model_id)
                replica = Replica(
                    target=ReplicaTarget(
                        replica_id=replica_id,
                        group=name,
                        base_model_id=placed.base_model_id,
                        shape=plan.shape,
                        gpu=plan.gpu,
                        nodes=nodes,
                        adapters=placed.adapters,
                        bases=base_shares(plan),
                    ),
                    state=ReplicaState.STARTING,
                    since_s=self._clock.wall_s(),
                    group_bases=tuple(one.base_model_id for one in plan.bases),
                    planned_nodes=planned_nodes,
                    release=releases.get(placed.base_model_id, ""),
                )
                self._rows.add_replica(session, number, replica)
                made.append(replica)
            return tuple(made)

        return await self._transactions.write_session(call)

    async def adopt(self, found: RunningReplica, group_bases: tuple[BaseModelId, ...]) -> Replica:
        """Records a replica that runs without a record, as one that starts: its start will adopt it."""

        def call(session: Session) -> Replica:
            # Its number is above all that this database has given, or becomes so: none is given twice.
            self._rows.skip_numbers(session, replica=_number(found.replica_id), group=_number(found.group))
            number, _ = self._rows.next_replica(session, found.base_model_id)
            replica = Replica(
                target=ReplicaTarget(
                    replica_id=found.replica_id,
                    group=found.group,
                    base_model_id=found.base_model_id,
                    shape=found.shape,
                    gpu=found.gpu,
                    nodes=found.nodes,
                ),
                state=ReplicaState.STARTING,
                since_s=self._clock.wall_s(),
                group_bases=group_bases,
                nodes=found.nodes,
            )
            self._rows.add_replica(session, number, replica)
            return replica

        return await self._transactions.write_session(call)

    async def put(self, replicas: Sequence[Replica]) -> None:
        """What was observed of them."""

        def call(session: Session) -> None:
            for replica in replicas:
                self._rows.put_replica(session, replica)

        await self._transactions.write_session(call)

    async def set_states(self, replica_ids: Sequence[ReplicaId], state: ReplicaState) -> tuple[Replica, ...]:
        at_s = self._clock.wall_s()
        return await self._transactions.write_session(
            lambda session: self._rows.set_states(session, replica_ids, state, at_s)
        )

    async def remove(self, replica_ids: Sequence[ReplicaId]) -> None:
        def call(session: Session) -> None:
            for replica_id in replica_ids:
                self._rows.remove_replica(session, replica_id)

        await self._transactions.write_session(call)

    async def apply(self, plan: Plan, *, source: str, reason: Reason, renumber: bool) -> PlanRecord:
        """Puts it in force. InvalidInput when its version is too high, Conflict when it is not above all that there
        were, unless ``renumber``."""

        def call(session: Session) -> PlanRecord:
            numbered = self._numbered(session, plan, renumber=renumber)
            self._rows.add_plan(
                session,
                numbered,
                source=source,
                state=PlanState.APPLYING,
                reason=reason.text,
                at_s=self._clock.wall_s(),
            )
            self._rows.activate(session, numbered.version, PlanState.APPLYING)
            kind = DecisionKind.ROLLED_BACK if source.startswith("rollback") else DecisionKind.APPLIED
            self._decide(session, kind, numbered.version, reason)
            return self._rows.plan(session, numbered.version)

        return await self._transactions.write_session(call)

    async def propose(self, plan: Plan, *, source: str, reason: Reason) -> PlanRecord:
        """Keeps it for an administrator. An older proposal that nobody took is replaced."""

        def call(session: Session) -> PlanRecord:
            for older in self._rows.plans(session, 100):
                if older.state is PlanState.PROPOSED:
                    self._rows.set_plan_state(session, older.plan.version, PlanState.REPLACED)
            numbered = self._numbered(session, plan, renumber=True)
            record = self._rows.add_plan(
                session,
                numbered,
                source=source,
                state=PlanState.PROPOSED,
                reason=reason.text,
                at_s=self._clock.wall_s(),
            )
            self._decide(session, DecisionKind.PROPOSED, numbered.version, reason)
            return record

        return await self._transactions.write_session(call)

    async def accept(self, version: int) -> PlanRecord:
        """Puts a proposal in force. NotFound; Conflict when it is none any more."""

        def call(session: Session) -> PlanRecord:
            record = self._rows.plan(session, version)
            if record.state is not PlanState.PROPOSED:
                raise Conflict(f"plan {version} is {record.state.value}, not proposed", param="version")
            self._rows.activate(session, version, PlanState.APPLYING)
            self._decide(session, DecisionKind.APPLIED, version, Reason(text="the proposal was accepted"))
            return self._rows.plan(session, version)

        return await self._transactions.write_session(call)

    async def use_config(self, reason: str) -> None:
        """No plan is in force any more but the config's."""

        def call(session: Session) -> None:
            self._rows.activate(session, 0, PlanState.APPLYING)
            self._decide(session, DecisionKind.ROLLED_BACK, 0, Reason(text=reason))

        await self._transactions.write_session(call)

    async def settle(self, version: int, reason: str) -> tuple[int, ...]:
        """Returns the numbers of the decisions that it comes from, and of its own: what comes now is their outcome."""

        def call(session: Session) -> tuple[int, ...]:
            self._rows.set_plan_state(session, version, PlanState.SETTLED)
            made = self._decide(session, DecisionKind.SETTLED, version, Reason(text=reason))
            causes = (DecisionKind.APPLIED, DecisionKind.ROLLED_BACK)
            return (
                *(
                    one.number
                    for one in self._rows.decisions(session, 1_000)
                    if one.plan_version == version and one.kind in causes and one.attainment_after is None
                ),
                made.number,
            )

        return await self._transactions.write_session(call)

    async def fail(self, version: int, reason: str) -> int:
        """Returns the version that is in force now."""

        def call(session: Session) -> int:
            fallback = self._rows.fail(session, version, reason)
            self._decide(session, DecisionKind.FAILED, version, Reason(text=f"{reason}; plan {fallback} is in force"))
            return fallback

        return await self._transactions.write_session(call)

    async def set_assigned(self, version: int, plan: Plan, reason: Reason) -> DecisionRecord:
        def call(session: Session) -> DecisionRecord:
            self._rows.set_assigned(session, version, plan)
            return self._decide(session, DecisionKind.REASSIGNED, version, reason)

        return await self._transactions.write_session(call)

    async def decide(self, kind: DecisionKind, version: int, reason: Reason) -> DecisionRecord:
        return await self._transactions.write_session(lambda session: self._decide(session, kind, version, reason))

    async def set_outcome(self, number: int, attainment_after: float) -> None:
        await self._transactions.write_session(
            lambda session: self._rows.set_outcome(session, number, attainment_after)
        )

    async def set_gain(self, number: int, predicted_gain: float) -> None:
        await self._transactions.write_session(lambda session: self._rows.set_gain(session, number, predicted_gain))

    async def plan(self, version: int) -> PlanRecord:
        """NotFound."""
        return await self._transactions.read_session(lambda session: self._rows.plan(session, version))

    async def before(self, version: int) -> PlanRecord | None:
        """The last plan that was in force before it and did not fail; None: the config's."""
        return await self._transactions.read_session(lambda session: self._rows.before(session, version))

    async def plans(self, limit: int) -> tuple[PlanRecord, ...]:
        """Newest first."""
        return await self._transactions.read_session(lambda session: self._rows.plans(session, limit))

    async def decisions(self, limit: int) -> tuple[DecisionRecord, ...]:
        """Newest first."""
        return await self._transactions.read_session(lambda session: self._rows.decisions(session, limit))

    async def wake(self, base: BaseModelId) -> None:
        def call(session: Session) -> None:
            self._rows.wake(session, base, self._clock.wall_s())
            version = self._rows.counters(session).active_version
            self._decide(session, DecisionKind.WOKEN, version, Reason(text=f"a request asked for {base}"))

        await self._transactions.write_session(call)

    async def sleep(self, base: BaseModelId, reason: str) -> None:
        def call(session: Session) -> None:
            self._rows.sleep(session, base)
            version = self._rows.counters(session).active_version
            self._decide(session, DecisionKind.ASLEEP, version, Reason(text=reason))

        await self._transactions.write_session(call)

    def _numbered(self, session: Session, plan: Plan, *, renumber: bool) -> Plan:
        last = self._rows.counters(session).last_version
        if renumber:
            return replace(plan, version=last + 1)
        if plan.version > _HIGHEST_VERSION:
            raise InvalidInput(f"plan version {plan.version} is above {_HIGHEST_VERSION:,}", param="version")
        if plan.version <= last:
            raise Conflict(f"plan version {plan.version} is not above {last}, the newest there is", param="version")
        return plan

    def _decide(self, session: Session, kind: DecisionKind, version: int, reason: Reason) -> DecisionRecord:
        return self._rows.add_decision(
            session,
            DecisionRecord(
                number=0,
                at_s=self._clock.wall_s(),
                kind=kind,
                plan_version=version,
                reason=reason.text,
                attainment_before=reason.attainment_before,
                predicted_gain=reason.predicted_gain,
            ),
        )


def _number(name: str) -> int:
    """At the end of an id; 0 for one that has none."""
    found = _TRAILING_NUMBER.search(name)
    return int(found[1][:9]) if found else 0
