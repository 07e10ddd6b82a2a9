"""Plans, decisions, replicas and their numbers in the control database: the one reader and writer of those tables.

Every method works inside a session that the caller opened and will commit. Decides nothing. Called by ``store``.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import msgspec
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from loraplex.controller.fleet.state import Replica, ReplicaState
from loraplex.controller.fleet.tables import DecisionRow, FleetRow, PlanRow, ReplicaRow, WokenRow
from loraplex.core.errors import NotFound
from loraplex.core.ids import BaseModelId, ReplicaId
from loraplex.core.plan import Plan
from loraplex.core.rollout import DecisionKind, DecisionRecord, PlanRecord, PlanState

logger = logging.getLogger(__name__)

_KEPT_DECISIONS = 10_000
_KEPT_PLANS = 1_000


class FleetRows:
    """Stateless."""

    def seen_counters(self, session: Session) -> FleetRow:
        """For reading: in a fresh database there are none yet."""
        return session.get(FleetRow, 1) or FleetRow(
            id=1, last_replica=0, last_group=0, last_version=0, active_version=0
        )

    def counters(self, session: Session) -> FleetRow:
        row = self.seen_counters(session)
        session.add(row)
        session.flush()
        return row

    def active_version(self, session: Session) -> int:
        """Of the plan in force; 0: the config's, as where the row of that in force is gone."""
        version = self.seen_counters(session).active_version
        if version and session.get(PlanRow, version) is None:
            logger.error("plan %d is in force but not in the database: the config's plan takes its place", version)
            return 0
        return version

    def next_group(self, session: Session) -> str:
        counters = self.counters(session)
        counters.last_group += 1
        return f"g{counters.last_group}"

    def next_replica(self, session: Session, base: BaseModelId) -> tuple[int, ReplicaId]:
        """(Number, id): neither is ever given again."""
        counters = self.counters(session)
        counters.last_replica += 1
        return counters.last_replica, ReplicaId(f"{base}-{counters.last_replica}")

    def skip_numbers(self, session: Session, *, replica: int, group: int) -> None:
        """Numbers up to these are in use, though this database did not give them."""
        counters = self.counters(session)
        counters.last_replica = max(counters.last_replica, replica)
        counters.last_group = max(counters.last_group, group)

    def replicas(self, session: Session) -> tuple[Replica, ...]:
        """In the order of their record."""
        rows = session.scalars(select(ReplicaRow).order_by(ReplicaRow.number))
        return tuple(msgspec.json.decode(row.body, type=Replica) for row in rows)

    def add_replica(self, session: Session, number: int, replica: Replica) -> None:
        session.add(
            ReplicaRow(
                number=number,
                replica_id=replica.target.replica_id,
                state=replica.state.value,
                body=msgspec.json.encode(replica).decode(),
            )
        )
        session.flush()

    def put_replica(self, session: Session, replica: Replica) -> None:
        """Nothing happens when its record is gone."""
        row = session.scalar(select(ReplicaRow).where(ReplicaRow.replica_id == replica.target.replica_id))
        if row is not None:
            row.state, row.body = replica.state.value, msgspec.json.encode(replica).decode()

    def set_states(
        self, session: Session, replica_ids: Iterable[ReplicaId], state: ReplicaState, at_s: float
    ) -> tuple[Replica, ...]:
        changed = []
        for row in session.scalars(select(ReplicaRow).where(ReplicaRow.replica_id.in_(list(replica_ids)))):
            replica = replace(msgspec.json.decode(row.body, type=Replica), state=state, since_s=at_s)
            row.state, row.body = state.value, msgspec.json.encode(replica).decode()
            changed.append(replica)
        return tuple(changed)

    def remove_replica(self, session: Session, replica_id: ReplicaId) -> None:
        session.execute(delete(ReplicaRow).where(ReplicaRow.replica_id == replica_id))

    def add_plan(
        self, session: Session, plan: Plan, *, source: str, state: PlanState, reason: str, at_s: float
    ) -> PlanRecord:
        counters = self.counters(session)
        row = PlanRow(
            version=plan.version,
            body=msgspec.json.encode(plan).decode(),
            assigned=None,
            source=source[:64],
            state=state.value,
            created_s=at_s,
            reason=reason,
            before=counters.active_version,
        )
        session.add(row)
        counters.last_version = max(counters.last_version, plan.version)
        session.flush()
        self._prune_plans(session, counters.active_version)
        return _plan_record(row)

    def activate(self, session: Session, version: int, state: PlanState) -> None:
        """The plan in force until now is replaced."""
        counters = self.counters(session)
        if counters.active_version not in (0, version):
            old = session.get(PlanRow, counters.active_version)
            if old is not None and old.state != PlanState.FAILED:
                old.state = PlanState.REPLACED.value
        if version:
            row = self._plan(session, version)
            if counters.active_version != version:
                row.before = counters.active_version
            row.state = state.value
        counters.active_version = version
        session.flush()

    def fail(self, session: Session, version: int, reason: str) -> int:
        """Returns the version that is in force now: the last one before it that did not fail."""
        row = self._plan(session, version)
        row.state, row.reason = PlanState.FAILED.value, reason
        fallback = self._before(session, version)
        if fallback is not None:
            fallback.state, fallback.assigned = PlanState.APPLYING.value, None
        in_force = 0 if fallback is None else fallback.version
        self.counters(session).active_version = in_force
        session.flush()
        return in_force

    def before(self, session: Session, version: int) -> PlanRecord | None:
        """The last plan that was in force before it and did not fail; None: the config's."""
        row = self._before(session, version)
        return None if row is None else _plan_record(row)

    def _before(self, session: Session, version: int) -> PlanRow | None:
        return next((row for row in self._line_back(session, version) if row.state != PlanState.FAILED), None)

    def _line_back(self, session: Session, version: int) -> Iterator[PlanRow]:
        """Those in force before it, latest first, until one that did not fail."""
        row = session.get(PlanRow, version)
        while row is not None and (row := session.get(PlanRow, row.before)) is not None:
            yield row
            if row.state != PlanState.FAILED:
                return

    def _prune_plans(self, session: Session, active_version: int) -> None:
        """Keeps the newest ones, whatever their numbers, that in force, and what comes into force if that fails."""
        newest = select(PlanRow.version).order_by(PlanRow.version.desc())
        oldest_kept = session.scalar(newest.offset(_KEPT_PLANS - 1).limit(1))
        if oldest_kept is not None:
            needed = [active_version, *(row.version for row in self._line_back(session, active_version))]
            session.execute(delete(PlanRow).where(PlanRow.version < oldest_kept, PlanRow.version.not_in(needed)))

    def set_plan_state(self, session: Session, version: int, state: PlanState) -> None:
        self._plan(session, version).state = state.value

    def set_assigned(self, session: Session, version: int, plan: Plan) -> None:
        self._plan(session, version).assigned = msgspec.json.encode(plan).decode()

    def plan(self, session: Session, version: int) -> PlanRecord:
        """NotFound."""
        return _plan_record(self._plan(session, version))

    def assigned(self, session: Session, version: int) -> Plan | None:
        body = self._plan(session, version).assigned
        return None if body is None else msgspec.json.decode(body, type=Plan)

    def plans(self, session: Session, limit: int) -> tuple[PlanRecord, ...]:
        """Newest first."""
        rows = session.scalars(select(PlanRow).order_by(PlanRow.version.desc()).limit(limit))
        return tuple(_plan_record(row) for row in rows)

    def add_decision(self, session: Session, decision: DecisionRecord) -> DecisionRecord:
        """``number`` is given here."""
        row = DecisionRow(
            at_s=decision.at_s,
            kind=decision.kind.value,
            plan_version=decision.plan_version,
            reason=decision.reason,
            attainment_before=decision.attainment_before,
            predicted_gain=decision.predicted_gain,
            attainment_after=decision.attainment_after,
        )
        session.add(row)
        session.flush()
        session.execute(delete(DecisionRow).where(DecisionRow.number <= row.number - _KEPT_DECISIONS))
        return replace(decision, number=row.number)

    def set_outcome(self, session: Session, number: int, attainment_after: float) -> None:
        row = session.get(DecisionRow, number)
        if row is not None:
            row.attainment_after = attainment_after

    def set_gain(self, session: Session, number: int, predicted_gain: float) -> None:
        row = session.get(DecisionRow, number)
        if row is not None:
            row.predicted_gain = predicted_gain

    def decisions(self, session: Session, limit: int) -> tuple[DecisionRecord, ...]:
        """Newest first."""
        rows: Sequence[DecisionRow] = session.scalars(
            select(DecisionRow).order_by(DecisionRow.number.desc()).limit(limit)
        ).all()
        return tuple(
            DecisionRecord(
                number=row.number,
                at_s=row.at_s,
                kind=DecisionKind(row.kind),
                plan_version=row.plan_version,
                reason=row.reason,
                attainment_before=row.attainment_before,
                predicted_gain=row.predicted_gain,
                attainment_after=row.attainment_after,
            )
            for row in rows
        )

    def woken(self, session: Session) -> dict[BaseModelId, float]:
        """Wall clock at which each base was woken."""
        return {BaseModelId(row.base_model_id): row.woken_s for row in session.scalars(select(WokenRow))}

    def wake(self, session: Session, base: BaseModelId, at_s: float) -> None:
        session.merge(WokenRow(base_model_id=base, woken_s=at_s))

    def sleep(self, session: Session, base: BaseModelId) -> None:
        session.execute(delete(WokenRow).where(WokenRow.base_model_id == base))

    def _plan(self, session: Session, version: int) -> PlanRow:
        row = session.get(PlanRow, version)
        if row is None:
            raise NotFound(f"there is no plan of version {version}", param="version")
        return row


def _plan_record(row: PlanRow) -> PlanRecord:
    return PlanRecord(
        plan=msgspec.json.decode(row.body, type=Plan),
        source=row.source,
        state=PlanState(row.state),
        created_s=row.created_s,
        reason=row.reason,
    )
