"""Keeps the machines at the plan in force: observes, asks ``diff`` what is next, records it, does it.

Owns the turns; what is seen of the replicas is ``events``', what should run ``plans``'.

Intents are written to the database before they are carried out and facts after they are seen, so that a controller
that dies anywhere leaves a successor that finishes or undoes what was begun. Without the database nothing new begins;
what serves goes on being served. All in one event loop; nothing here waits for a replica.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import replace
from typing import Protocol, TypeVar

from loraplex.controller.fleet.config import FleetConfig
from loraplex.controller.fleet.crew import Crew, Event
from loraplex.controller.fleet.desired import Desired
from loraplex.controller.fleet.diff import (
    Action,
    Assign,
    Decided,
    Drain,
    Observed,
    StartReplicas,
    Stop,
    TakeBack,
    decide,
)
from loraplex.controller.fleet.drains import Drains, Loads
from loraplex.controller.fleet.events import EventDesk
from loraplex.controller.fleet.nodes import NodeWatch
from loraplex.controller.fleet.placing import Placer
from loraplex.controller.fleet.plans import PlanDesk
from loraplex.controller.fleet.roster import Roster
from loraplex.controller.fleet.state import AdapterKey, FleetBase, Kind, Replica, ReplicaState, adapter_keys, routes_of
from loraplex.controller.fleet.status import fleet_status
from loraplex.controller.fleet.store import FleetStore
from loraplex.core.clock import Clock
from loraplex.core.control import ReplicaRoute
from loraplex.core.errors import LoraplexError, Unavailable
from loraplex.core.fleet import Actuator, NodeStatus
from loraplex.core.ids import BaseModelId, ReplicaId
from loraplex.core.plan import Plan, Shape
from loraplex.core.rollout import FleetStatus

logger = logging.getLogger(__name__)

T = TypeVar("T")
_CALL_TIMEOUT_S = 10.0


class PublishRoutes(Protocol):
    def __call__(self, routes: tuple[ReplicaRoute, ...], *, asleep: bool) -> None: ...


class FleetManager:
    """``await recover()`` before snapshots are answered, ``run()`` as a task, ``await stop()`` at the end.

    ``Controller.run_fleet`` does all of this; who embeds a controller calls that. Plans change through ``plans``.
    """

    def __init__(
        self,
        actuator: Actuator,
        store: FleetStore,
        *,
        publish: PublishRoutes,
        loads: Loads,
        adapters: Callable[[], Collection[AdapterKey]],
        bases: Mapping[BaseModelId, FleetBase],
        default_plan: Plan,
        config: FleetConfig,
        clock: Clock,
    ) -> None:
        """``publish`` replaces the whole route table. ``loads``: requests that run or wait on a replica. ``adapters``:
        those that exist; others in a plan are passed over until they do. ``default_plan``: in force until one is
        applied; its version is taken as 0."""
        self._actuator, self._store, self._publish_routes = actuator, store, publish
        self._config, self._clock, self._bases = config, clock, bases
        self._desired = Desired(replace(default_plan, version=0), bases, adapters, created_s=clock.wall_s())
        self._drains = Drains(config, loads)
        self._nodes = NodeWatch(hold_s=config.node_hold_s, max_hold_s=config.node_max_hold_s)
        self._placer = Placer(bases)
        self._crew = Crew(actuator, epoch=store.epoch, retry_s=config.retry_first_s, tell=self._hear)
        self._roster = Roster(store, clock, bases)
        self._events = EventDesk(self._roster, self._crew, store, self._desired, self._nodes, config, clock)
        self._decided: Decided | None = None
        self._problem = ""
        self._superseded = False
        self._wake = asyncio.Event()
        self.plans = PlanDesk(
            store, self._desired, self._nodes, clock, may_grow=config.autoscale, changed=self._plan_changed
        )
        self._loop: asyncio.Task[None] | None = None
        self.on_settled: Callable[[tuple[int, ...]], None] = lambda numbers: None
        """Told the numbers of its decisions, when a plan has been reached."""
        self._failed_kinds: set[Kind] = set()

    async def recover(self) -> None:
        """Reads what the last controller left, and routes what it routed. Raises Unavailable, StorageFull."""
        stored = await self._store.load()
        self._desired.take(stored.active, stored.assigned, stored.woken)
        self._roster.take(stored.replicas)
        self._publish()

    async def run(self) -> None:
        """Until ``stop``, or until a later controller has taken over."""
        self._loop = asyncio.current_task()
        adopted = False
        while not self._superseded:
            try:
                if not adopted:
                    await self._adopt()
                    adopted = True
                await self._step()
                self._problem = ""
            except LoraplexError as error:
                self._superseded |= error.code == "superseded"
                if self._problem != error.message:
                    logger.warning("the fleet stays as it is for now: %s", error.message)
                self._problem = error.message
            except Exception:  # a bug must not leave the replicas without anybody
                logger.exception("a turn of the fleet failed")
                self._problem = "an internal error, see the controller's log"
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._config.tick_s):
                    await self._wake.wait()
            self._wake.clear()
        await self._crew.close()
        logger.error("a later controller has taken over: this one gives no more commands")

    async def stop(self) -> None:
        """Replicas go on running. Idempotent."""
        if self._loop is not None and not self._loop.done():
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)
        await self._crew.close()

    @property
    def replicas(self) -> tuple[Replica, ...]:
        return tuple(self._roster)

    def usable_nodes(self) -> tuple[NodeStatus, ...]:
        return self._nodes.usable(self._clock.monotonic_s())

    @property
    def failed_kinds(self) -> tuple[tuple[str, Shape, tuple[BaseModelId, ...]], ...]:
        """(GPU type, shape, bases) of groups for which a plan was given up: nobody should plan them again."""
        return tuple((kind.gpu, kind.shape, tuple(sorted(kind.bases))) for kind in self._failed_kinds)

    def failures(self) -> dict[ReplicaId, str]:
        """Of each kind of group that has a replica down, the last one and why."""
        return self._events.failures()

    def status(self) -> FleetStatus:
        plan, extra = self._desired.groups()
        return fleet_status(
            self._config.mode,
            self._desired,
            self._placer.place(plan, extra, self.replicas, self.usable_nodes()),
            self.replicas,
            settled=self._decided is not None and self._decided.settled,
            outdated=self._roster.outdated_groups(),
            why=lambda group: self._events.start_failure(Kind.of(group)),
            problem=self._problem,
        )

    def validate(self) -> None:
        """Asserts the invariants of what it holds."""
        self._roster.validate()

    # One turn.

    async def _step(self) -> None:
        async with self.plans.turn:
            if self._events.take():
                self._publish()
            await self._events.save()
        await self._look()
        async with self.plans.turn:
            now_s = self._clock.monotonic_s()
            plan, extra = self._desired.groups()
            observed = Observed(
                replicas=self.replicas,
                nodes=self._nodes.usable(now_s),
                held_back=frozenset(filter(self._events.start_held_back, map(Kind.of, (*plan, *extra)))),
                drained=self._drains.drained(now_s),
                crowded=frozenset(
                    replica.target.group
                    for replica in self.replicas
                    if replica.state is ReplicaState.STARTING
                    and self._roster.in_state_s(replica.target.replica_id) > self._config.crowded_s
                ),
                may_grow=self._config.autoscale,
            )
            placement = self._placer.place(plan, extra, observed.replicas, observed.nodes)
            self._decided = decide(placement, observed, self._bases)
            for action in self._decided.actions:
                await self._act(action)
            await self._conclude(self._decided)

    async def _look(self) -> None:
        now_s = self._clock.monotonic_s()
        self._nodes.observe(await _bounded(self._actuator.nodes()), now_s)
        if any(r.state is ReplicaState.SERVING and not r.nodes for r in self.replicas):
            for found in await _bounded(self._actuator.running()):
                replica = self._roster.get(found.replica_id)
                if replica is not None and found.nodes and not replica.nodes:
                    self._roster.put(replace(replica, nodes=found.nodes))
        woken = {replica.target.replica_id for replica in self._desired.woken_replicas(self.replicas)}
        draining = {r.target.replica_id for r in self.replicas if r.state is ReplicaState.DRAINING}
        loads = await self._drains.look(draining, woken, self._clock.monotonic_s())
        for base, reason in self._desired.idle_bases(
            self.replicas, loads, self._clock.monotonic_s(), idle_s=self._config.idle_s
        ):
            await self._store.sleep(base, reason)
            self._desired.sleep(base)

    async def _act(self, action: Action) -> None:
        match action:
            case StartReplicas():
                for replica in await self._roster.begin(action):
                    self._crew.start(replica.target)
            case Assign():
                await self._assign(action)
            case Drain():
                await self._set_states(action.replica_ids, ReplicaState.DRAINING)
                logger.info("%s drain: %s", ", ".join(action.replica_ids), action.reason)
            case TakeBack():
                await self._set_states(action.replica_ids, ReplicaState.SERVING)
                self._drains.forget(action.replica_ids)
            case Stop():
                await self._set_states(action.replica_ids, ReplicaState.STOPPING)
                logger.info("%s stop: %s", ", ".join(action.replica_ids), action.reason)
                for replica_id in action.replica_ids:
                    self._crew.stop(replica_id)

    async def _set_states(self, replica_ids: tuple[ReplicaId, ...], state: ReplicaState) -> None:
        await self._roster.set_states(replica_ids, state)
        self._publish()

    async def _assign(self, action: Assign) -> None:
        """What is gained is loaded, then routed; what is lost is routed away, then may go."""
        replica = self._roster[action.replica_id]
        if self._crew.assigning(action.replica_id) or self._events.assign_held_back(action.replica_id):
            return
        target = replace(replica.target, adapters=action.adapters)
        had, has = adapter_keys(replica.target.adapters), adapter_keys(action.adapters)
        if has <= had:
            await self._roster.replace(replace(replica, target=target))
            self._publish()
        if has != had:
            self._crew.assign(target)

    async def _conclude(self, decided: Decided) -> None:
        """The plan has been reached, or has failed."""
        active = self.plans.active
        if decided.settled:
            left_out = f"; {len(decided.left_out)} groups find no room" if decided.left_out else ""
            if self._desired.is_applying:
                if active.plan.version:
                    self.on_settled(await self._store.settle(active.plan.version, f"all groups serve{left_out}"))
                self._desired.settled()
            return
        if not self._desired.is_applying or not active.plan.version:
            return
        for index, group in enumerate(active.plan.groups):
            kind = Kind.of(group)
            serves = index in decided.groups and decided.groups[index].serves
            if not serves and self._events.start_given_up(kind):
                self._failed_kinds.add(kind)
                reason = f"group {group.name} cannot be started: {self._events.start_failure(kind)}"
                fallback = await self._store.fail(active.plan.version, reason)
                logger.error("plan %d failed, plan %d is in force: %s", active.plan.version, fallback, reason)
                self._desired.activate(await self._store.plan(fallback) if fallback else None)
                self._plan_changed()
                return

    def _plan_changed(self) -> None:
        self._events.plan_changed()
        self._wake.set()

    async def _adopt(self) -> None:
        """What already runs."""
        self._nodes.observe(await _bounded(self._actuator.nodes()), self._clock.monotonic_s())
        running = {found.replica_id: found for found in await _bounded(self._actuator.running())}
        await self._events.adopt(running)
        self._publish()

    def _publish(self) -> None:
        self._publish_routes(routes_of(self._roster), asleep=self._desired.is_nothing)

    def _hear(self, event: Event) -> None:
        self._events.hear(event)
        self._wake.set()


async def _bounded(call: Awaitable[T]) -> T:
    try:
        async with asyncio.timeout(_CALL_TIMEOUT_S):
            return await call
    except TimeoutError:
        raise Unavailable("the machines do not answer") from None
