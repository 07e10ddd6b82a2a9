"""A replica of the exact simulator: the real engine, and a device that knows how long things take.

Owns no decision. Called by ``exact``.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from loraplex.core.ids import Digest, ReplicaId
from loraplex.core.request import EngineRequest, RequestOutput
from loraplex.core.step import ArenaSpec, SampledToken, StepPlan, StepResult
from loraplex.engine import AdapterLoad, Engine
from loraplex.router.policy import ReplicaView
from loraplex.simulator.cluster import PAGE_SIZE, Cluster, rates_of
from loraplex.simulator.plan_time import PlanTime
from loraplex.simulator.stages import StageLine
from loraplex.simulator.types import SimulationInput
from loraplex.simulator.workload import Workload


class Device:
    """The GPUs of a group: the replicas by turns, as ``model_runner.turns`` has them; one host link for adapters."""

    def __init__(self) -> None:
        self.link_free_s = 0.0
        self._is_taken = False
        self._waiting: deque[VirtualReplica] = deque()

    @property
    def is_wanted(self) -> bool:
        """A replica waits for the turn that another has."""
        return bool(self._waiting)

    def take(self, replica: "VirtualReplica") -> bool:
        """The turn, at once; False: it comes when those before it had theirs."""
        if self._is_taken:
            self._waiting.append(replica)
            return False
        self._is_taken = True
        return True

    def hand_over(self, now_s: float) -> None:
        if self._waiting:
            self._waiting.popleft().begin_turn(now_s)
        else:
            self._is_taken = False


class _Planned(NamedTuple):
    plan: StepPlan
    ready_s: float
    """When its adapters are there."""
    latency_s: float
    interval_s: float


class VirtualReplica:
    def __init__(
        self,
        given: SimulationInput,
        workload: Workload,
        cluster: Cluster,
        index: int,
        device: Device,
        *,
        started: Callable[[int, float], None],
    ) -> None:
        """``started``: hears of each step that begins, its replica's index and when its tokens will be there."""
        replica = cluster.replicas[index]
        self.replica_id: ReplicaId = replica.replica_id
        self._config, self._num_stages = given.engine, replica.shape.pp
        self._most_in_flight = self._num_stages + given.max_in_flight - 1
        self._alone_s = replica.cost.step.alone_s if self._num_stages > 1 else 0.0
        self._turn_s = max(given.turn_s, self._alone_s)
        memory = replica.cost.memory
        arena = ArenaSpec(num_pages=replica.num_pages, page_size=PAGE_SIZE, page_bytes=memory.page_bytes)
        self.engine = Engine(given.engine, model=replica.cost.model, arena=arena, num_stages=self._num_stages)
        self._page_bytes = memory.page_bytes
        self._device = device
        self._index, self._started = index, started
        self._time = PlanTime(replica.cost.step, replica.shape)
        self._table = cluster.tables[index]
        self._size_of = {
            Digest(key): int(size) for key, size in zip(workload.adapter_keys, workload.adapter_size, strict=True)
        }
        self._loaded_s: dict[Digest, float] = {}
        self._line = StageLine(self._num_stages)
        self._in_flight: deque[StepPlan] = deque()
        self._next: _Planned | None = None
        """It waits for the turn."""
        self._num_in_turn = 0
        """Steps that began in this turn."""
        self._expects_others = False
        self.view = ReplicaView(
            replica_id=self.replica_id, rates=rates_of(given, replica), room_tokens=replica.num_pages * PAGE_SIZE
        )
        self._sent: Counter[Digest] = Counter()
        self.view.sent = self._sent
        self.view.absence_s = self._absence_s
        self.view.credits = self.credits
        self._asked: set[Digest] = set()
        self._seen_version = 0
        self._fetch_free_s = 0.0
        self.busy_s = 0.0
        self.num_steps = 0
        self.num_loads = 0
        self.load_bytes = 0

    @property
    def credits(self) -> int:
        """What it will take, by the count of its one router."""
        return self._config.max_running + self._config.max_waiting - self.engine.num_unfinished

    def add(self, request: EngineRequest, now_s: float) -> None:
        """InvalidInput when it can never hold the request."""
        digest = request.adapter.digest if request.adapter is not None else None
        if digest is not None and self._table.fetch_s[self._size_of[digest]] == 0.0:
            self.engine.adapter_staged(digest, self._pages(digest), now_s)
        self.engine.add(request, now_s)
        if digest is not None:
            self._asked.add(digest)
            self._sent[digest] += 1
        self.view.queued_tokens += len(request.prompt_token_ids)
        self.view.prompt_tokens += len(request.prompt_token_ids)
        self._count()

    def ended(self, digest: Digest | None, num_prompt_tokens: int) -> None:
        """A request of this adapter and prompt ended."""
        if digest is not None:
            self._sent[digest] -= 1
            if self._sent[digest] == 0:
                del self._sent[digest]
        self.view.prompt_tokens -= num_prompt_tokens
        self._count()

    def fetch(self, now_s: float) -> Iterator[tuple[Digest, float]]:
        """Adapters that are not in host memory, and when they will be: one after another."""
        for digest in self.engine.wanted_adapters():
            self._fetch_free_s = max(self._fetch_free_s, now_s) + float(self._table.fetch_s[self._size_of[digest]])
            yield digest, self._fetch_free_s

    def staged(self, digest: Digest, now_s: float) -> tuple[RequestOutput, ...]:
        return self.engine.adapter_staged(digest, self._pages(digest), now_s)

    def plan(self, now_s: float) -> None:
        """As ``replica.driver``: as many steps as may be in flight, of which one may wait for the turn."""
        while self._next is None and len(self._in_flight) < self._max_in_flight:
            instructions = self.engine.schedule(now_s)
            for load in instructions.loads:
                self._load(load, now_s)
            if instructions.plan is None:
                return
            planned = self._timed(instructions.plan)
            if self._in_flight:
                self._begin(planned, now_s)
            elif self._device.take(self):
                self._begin(planned, now_s + self._alone_s)
            else:
                self._next = planned

    def begin_turn(self, now_s: float) -> None:
        """It had to wait for it. Called by the device."""
        assert self._next is not None, "it did not ask for a turn"
        planned, self._next = self._next, None
        self._expects_others = True
        self._begin(planned, now_s + self._turn_s)
        self.plan(now_s)

    @property
    def _max_in_flight(self) -> int:
        """As ``TurnExecutor``: no more than there are, when the turn is another's next."""
        is_over = self._num_in_turn >= self._num_stages and (self._expects_others or self._device.is_wanted)
        return len(self._in_flight) if is_over else self._most_in_flight

    def _begin(self, planned: _Planned, now_s: float) -> None:
        span = self._line.enter(max(now_s, planned.ready_s), latency_s=planned.latency_s, interval_s=planned.interval_s)
        self._in_flight.append(planned.plan)
        self._num_in_turn += 1
        self.busy_s += span.busy_s
        self.num_steps += 1
        self._started(self._index, span.end_s)

    def collect(self, now_s: float) -> tuple[RequestOutput, ...]:
        """The oldest step under way is done; with the last one the turn ends."""
        plan = self._in_flight.popleft()
        self._expects_others = False
        if not self._in_flight:
            self._num_in_turn = 0
            self._device.hand_over(now_s)
        tokens = tuple(SampledToken(slot=row.slot, token_id=0) for row in plan.rows if row.samples)
        outputs = self.engine.complete(StepResult(step_id=plan.step_id, tokens=tokens, duration_s=0.0), now_s)
        report = self.engine.load_report()
        self.view.queued_tokens = report.num_queued_tokens
        self.view.room_tokens = report.num_free_pages * PAGE_SIZE
        if self.engine.residency_version != self._seen_version:
            self._seen_version = self.engine.residency_version
            self.view.resident = frozenset(self.engine.resident_adapters())
        return outputs

    def _absence_s(self, digest: Digest) -> float:
        """Until an adapter that is not resident would be."""
        size = self._size_of[digest]
        fetch_s = 0.0 if digest in self._asked else float(self._table.fetch_s[size])
        return fetch_s + float(self._table.load_s[size])

    def _count(self) -> None:
        self.view.rows = self.engine.num_unfinished
        self.view.credits = self.credits

    def _pages(self, digest: Digest) -> int:
        return int(self._table.pages[self._size_of[digest]])

    def _load(self, load: AdapterLoad, now_s: float) -> None:
        load_s = float(self._table.load_s[self._size_of[load.digest]])
        self._device.link_free_s = max(self._device.link_free_s, now_s) + load_s
        self._loaded_s[load.digest] = self._device.link_free_s
        self.num_loads += 1
        self.load_bytes += len(load.pages) * self._page_bytes

    def _timed(self, plan: StepPlan) -> _Planned:
        adapters = {row.adapter for row in plan.rows if row.adapter is not None}
        whole_bytes = float(sum(self._table.whole_bytes[self._size_of[digest]] for digest in adapters))
        latency_s, interval_s = self._time.seconds(plan, num_adapters=len(adapters), adapter_bytes=whole_bytes)
        ready_s = max((self._loaded_s[digest] for digest in adapters), default=0.0)
        return _Planned(plan, ready_s, latency_s, interval_s)
