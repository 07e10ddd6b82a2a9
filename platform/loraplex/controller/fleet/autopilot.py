"""Makes plans from traffic: the slow loop asks the planner for layouts, the fast one moves adapters among replicas.

Also measures what came of every change of plan, whoever made it. Mode ``auto`` applies, ``propose`` keeps plans for an
administrator, ``off`` only measures. Everything that is decided is recorded with its reason.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace

from loraplex.controller.fleet.assign import reassigned
from loraplex.controller.fleet.config import FleetConfig
from loraplex.controller.fleet.manager import FleetManager
from loraplex.controller.fleet.meter import TrafficMeter
from loraplex.controller.fleet.replan import Answer, Task, replan
from loraplex.controller.fleet.store import FleetStore, Reason
from loraplex.core.clock import Clock
from loraplex.core.errors import LoraplexError
from loraplex.core.ids import BaseModelId
from loraplex.core.plan import Plan
from loraplex.core.rollout import DecisionKind

logger = logging.getLogger(__name__)

Planner = Callable[[Task], Awaitable[Answer]]
_CHANGES = (DecisionKind.APPLIED, DecisionKind.ROLLED_BACK, DecisionKind.REASSIGNED)


class Autopilot:
    def __init__(
        self,
        manager: FleetManager,
        store: FleetStore,
        meter: TrafficMeter,
        *,
        config: FleetConfig,
        trace_url: Callable[[], str],
        unwritten: Callable[[float], bytes],
        lora_ranks: Callable[[], Mapping[str, int]],
        bases: tuple[BaseModelId, ...],
        clock: Clock,
        planner: Planner = replan,
    ) -> None:
        """``unwritten``: as ``TraceSink``. ``lora_ranks``: of ``tenant/name``."""
        self._manager, self._store, self._meter, self._config = manager, store, meter, config
        self._trace_url, self._unwritten = trace_url, unwritten
        self._lora_ranks, self._bases = lora_ranks, bases
        self._clock, self._planner = clock, planner
        self._outcomes: dict[int, tuple[float, float]] = {}
        """Decision -> (when it is measured, monotonic; over how many seconds)."""
        self._to_predict: deque[tuple[tuple[int, ...], Plan, Plan]] = deque(maxlen=100)
        """Decisions of which nobody has said yet what they should win: the plan before, the plan after."""
        self._settled_plan: Plan | None = None
        manager.on_settled = self._settled

    async def run(self) -> None:
        """Until it is cancelled."""
        await self._resume()
        loops = [self._forever(self.measure, min(1.0, self._config.planning.window_s), "measuring")]
        if self._config.planning.profiles:
            loops.append(self._forever(self.predict, 1.0, "predicting"))
        if self._config.mode == "auto" and self._config.planning.reassign_interval_s > 0:
            loops.append(self._forever(self.reassign, self._config.planning.reassign_interval_s, "moving adapters"))
        if self._config.mode != "off" and self._config.planning.profiles:
            loops.append(self._forever(self.plan, self._config.planning.interval_s, "planning"))
        await asyncio.gather(*loops)

    async def plan(self) -> None:
        """Asks the planner once, and does what it says."""
        planning = self._config.planning
        active = self._manager.plans.active
        if not self._manager.status().settled:
            return  # what is measured now says nothing of the plan that comes
        answer = await self._planner(await self._task())
        measured = self._meter.attainment(planning.window_s)
        reason = Reason(text=answer.reason, attainment_before=measured, predicted_gain=answer.gain)
        if self._manager.plans.active.plan.version != active.plan.version:
            return
        if answer.plan is None:
            await self._store.decide(DecisionKind.KEPT, active.plan.version, reason)
        elif self._config.mode == "auto":
            await self._manager.plans.apply(answer.plan, source="planner", reason=reason, renumber=True)
        else:
            await self._manager.plans.propose(answer.plan, source="planner", reason=reason)

    async def reassign(self) -> None:
        """Looks at the rates once, and moves adapters where that evens them out."""
        planning = self._config.planning
        plans = self._manager.plans
        if self._meter.num_requests(planning.rate_window_s) < 20 or not self._manager.status().settled:
            return
        version, before = plans.active.plan.version, plans.assigned
        made, lines = reassigned(plans.active.plan, before, self._meter.rates(planning.rate_window_s))
        if not lines:
            return
        reason = Reason(text="; ".join(lines), attainment_before=self._meter.attainment(planning.rate_window_s))
        decision = await plans.reassign(version, made, reason)
        if decision is not None:
            self._measure_later(decision.number, planning.rate_window_s)
            self._to_predict.append(((decision.number,), before, made))

    async def predict(self) -> None:
        """Records of one change that the planner did not make what it should win, by the recorded traffic."""
        if not self._to_predict:
            return
        numbers, before, after = self._to_predict.popleft()
        recorded = await self._store.decisions(100)
        unsaid = [
            one.number
            for one in recorded
            if one.number in numbers and one.kind in _CHANGES and one.predicted_gain is None
        ]
        if not unsaid:
            return
        answer = await self._planner(replace(await self._task(), current=before, instead=after))
        if answer.gain is not None:
            for number in unsaid:
                await self._store.set_gain(number, answer.gain)

    async def measure(self) -> None:
        """Records what came of the changes whose time has come."""
        now_s = self._clock.monotonic_s()
        for number, (at_s, window_s) in list(self._outcomes.items()):
            if now_s >= at_s:
                attainment = self._meter.attainment(window_s)
                if attainment is not None:
                    await self._store.set_outcome(number, attainment)
                del self._outcomes[number]

    async def _resume(self) -> None:
        """What an earlier controller did not live to measure."""
        version = self._manager.plans.active.plan.version
        self._settled_plan = self._manager.plans.assigned
        try:
            recorded = await self._store.decisions(100)
        except LoraplexError as error:
            logger.warning("what came of earlier decisions is not measured: %s", error.message)
            return
        for decision in recorded:
            is_new = decision.attainment_after is None and decision.plan_version == version
            if is_new and decision.kind in (DecisionKind.SETTLED, *_CHANGES):
                self._measure_later(decision.number, self._config.planning.window_s)

    def _settled(self, numbers: tuple[int, ...]) -> None:
        for number in numbers:
            self._measure_later(number, self._config.planning.window_s)
        before, self._settled_plan = self._settled_plan, self._manager.plans.assigned
        if before is not None:
            self._to_predict.append((numbers, before, self._settled_plan))

    async def _task(self) -> Task:
        """To find the plan that the recent traffic asks for."""
        planning = self._config.planning
        since_s = self._clock.wall_s() - planning.window_s
        return Task(
            trace_url=self._trace_url(),
            since_s=since_s,
            unwritten=await asyncio.to_thread(self._unwritten, since_s),
            nodes=self._manager.usable_nodes(),
            current=self._manager.plans.assigned,
            config=planning,
            bases=self._bases,
            lora_ranks=dict(self._lora_ranks()),
            not_these=self._manager.failed_kinds,
        )

    def _measure_later(self, number: int, window_s: float) -> None:
        self._outcomes[number] = (self._clock.monotonic_s() + window_s, window_s)

    async def _forever(self, step: Callable[[], Awaitable[None]], interval_s: float, what: str) -> None:
        while True:
            await asyncio.sleep(interval_s)
            try:
                await step()
            except LoraplexError as error:
                logger.warning("%s failed, will be tried again: %s", what, error.message)
            except Exception:  # the next turn may find what this one could not bear
                logger.exception("%s failed, will be tried again", what)
