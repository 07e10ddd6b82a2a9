"""Commands that change what should run: apply, accept, roll back, move adapters, wake a base.

Each is one transaction of ``store`` and one change of ``Desired``, between two turns of the manager.
"""

import asyncio
from collections.abc import Callable
from dataclasses import replace

from loraplex.controller.fleet.desired import Desired
from loraplex.controller.fleet.nodes import NodeWatch
from loraplex.controller.fleet.store import FleetStore, Reason
from loraplex.core.clock import Clock
from loraplex.core.errors import InvalidInput
from loraplex.core.ids import BaseModelId
from loraplex.core.plan import Plan
from loraplex.core.rollout import DecisionKind, DecisionRecord, PlanRecord


class PlanDesk:
    def __init__(
        self,
        store: FleetStore,
        desired: Desired,
        nodes: NodeWatch,
        clock: Clock,
        *,
        may_grow: bool,
        changed: Callable[[], None],
    ) -> None:
        """``changed``: another plan is in force, or something else should run."""
        self.store, self._desired, self._nodes, self._clock = store, desired, nodes, clock
        self._may_grow, self._changed = may_grow, changed
        self.turn = asyncio.Lock()
        """Held while something is decided or changed."""

    async def apply(self, plan: Plan, *, source: str, reason: Reason, renumber: bool = False) -> PlanRecord:
        """Puts it in force. InvalidInput when it is not for this cluster; Conflict when a newer one has been there."""
        self.check(plan)
        async with self.turn:
            record = await self.store.apply(plan, source=source, reason=reason, renumber=renumber)
            self._activate(record)
        return record

    async def propose(self, plan: Plan, *, source: str, reason: Reason) -> PlanRecord:
        self.check(plan)
        return await self.store.propose(plan, source=source, reason=reason)

    async def accept(self, version: int) -> PlanRecord:
        """Puts a proposal in force. NotFound, Conflict, InvalidInput."""
        self.check((await self.store.plan(version)).plan)
        async with self.turn:
            record = await self.store.accept(version)
            self._activate(record)
        return record

    async def rollback(self, version: int | None) -> PlanRecord:
        """To an older plan, by default the one before; it gets a new version. 0: the config's own."""
        active = self.active
        if version is None:
            before = await self.store.before(active.plan.version)
        else:
            before = await self.store.plan(version) if version else None
        if before is not None:
            source = f"rollback to {before.plan.version}"
            reason = Reason(text=f"rolled back from plan {active.plan.version}")
            return await self.apply(before.plan, source=source, reason=reason, renumber=True)
        if active.plan.version == 0:
            raise InvalidInput("no plan was in force before the config's own", param="version")
        async with self.turn:
            await self.store.use_config(f"rolled back from plan {active.plan.version}")
            self._activate(None)
        return self.active

    async def reassign(self, version: int, plan: Plan, reason: Reason) -> DecisionRecord | None:
        """The plan in force with other adapter sets; None when another has come into force meanwhile."""
        async with self.turn:
            if self.active.plan.version != version:
                return None
            # The config's plan is no row that could be changed: moves within it are forgotten at a restart.
            made = (
                await self.store.set_assigned(version, plan, reason)
                if version
                else await self.store.decide(DecisionKind.REASSIGNED, version, reason)
            )
            self._desired.assigned = plan
            self._changed()
            return made

    async def wake_base(self, base: BaseModelId) -> None:
        """A base without a group in the plan gets a replica where GPUs are free, until nobody asks any more. NotFound
        for a base that the config does not have."""
        if self._desired.is_asked_for(base, self._clock.monotonic_s()):
            await self.store.wake(base)
            self._desired.wake(base, self._clock.monotonic_s())
            self._changed()

    def check(self, plan: Plan) -> None:
        """InvalidInput, or Unavailable while the nodes are not known yet."""
        self._desired.check(plan, self._nodes, may_grow=self._may_grow)

    async def record(self, version: int | None) -> PlanRecord:
        """None: the one in force, with its adapters where they are meant to be now. NotFound."""
        if version is None:
            return replace(self.active, plan=self.assigned)
        return await self.store.plan(version)

    async def history(self, limit: int) -> tuple[PlanRecord, ...]:
        """Newest first."""
        return await self.store.plans(limit)

    async def decisions(self, limit: int) -> tuple[DecisionRecord, ...]:
        """Newest first."""
        return await self.store.decisions(limit)

    @property
    def active(self) -> PlanRecord:
        return self._desired.active

    @property
    def assigned(self) -> Plan:
        """The plan in force with its adapters where they are meant to be now."""
        return self._desired.plan

    def _activate(self, record: PlanRecord | None) -> None:
        self._desired.activate(record)
        self._changed()
