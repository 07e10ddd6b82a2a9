"""A replica of the exact simulator: the real engine, and a device that knows how long things take.

Owns no decision. Called by ``exact``.
"""

from collections import Counter, deque
from collections.abc import Iterator

from loraplex.core.ids import Digest, ReplicaId
from loraplex.core.request import EngineRequest, RequestOutput
from loraplex.core.step import ArenaSpec, SampledToken, StepPlan, StepResult
from loraplex.engine import AdapterLoad, Engine
from loraplex.router.policy import ReplicaView
from loraplex.simulator.cluster import PAGE_SIZE, Cluster, rates_of
from loraplex.simulator.plan_time import PlanTime
from loraplex.simulator.types import SimulationInput
from loraplex.simulator.workload import Workload


class Device:
    """The GPUs of a group: one step at a time, the replicas by turns; one host link for adapters."""

    def __init__(self) -> None:
        self.replicas: list[VirtualReplica] = []
        self.link_free_s = 0.0
        self._running: VirtualReplica | None = None
        self._last = 0

    def start_next(self, now_s: float) -> "tuple[VirtualReplica, float] | None":
        """Begins a planned step of the replica whose turn it is: (whose, when it will be done). None: a step runs, or
        none is planned."""
        if self._running is not None:
            return None
        count = len(self.replicas)
        for offset in range(1, count + 1):
            turn = (self._last + offset) % count
            done_s = self.replicas[turn].start_step(now_s)
            if done_s is not None:
                self._last, self._running = turn, self.replicas[turn]
                return self._running, done_s
        return None

    def step_done(self) -> None:
        self._running = None

    def wanted_beside(self, replica: "VirtualReplica") -> bool:
        """Another one has a step planned, or under way."""
        return any(other.is_busy for other in self.replicas if other is not replica)


class VirtualReplica:
    def __init__(
        self, given: SimulationInput, workload: Workload, cluster: Cluster, index: int, device: Device
    ) -> None:
        replica = cluster.replicas[index]
        self.replica_id: ReplicaId = replica.replica_id
        self._config, self._max_in_flight = given.engine, given.max_in_flight
        memory = replica.cost.memory
        arena = ArenaSpec(num_pages=replica.num_pages, page_size=PAGE_SIZE, page_bytes=memory.page_bytes)
        self.engine = Engine(given.engine, model=replica.cost.model, arena=arena)
        self._page_bytes = memory.page_bytes
        self._device = device
        device.replicas.append(self)
        self.index = index
        self._time = PlanTime(replica.cost.step, replica.shape)
        self._table = cluster.tables[index]
        self._size_of = {
            Digest(key): int(size) for key, size in zip(workload.adapter_keys, workload.adapter_size, strict=True)
        }
        self._loaded_s: dict[Digest, float] = {}
        self._planned: deque[tuple[StepPlan, float, float]] = deque()
        """(plan, when its adapters are there, how long it takes); the first one may be under way."""
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
        """As many steps as may be in flight: as long as the group's other replicas want the device, one."""
        while self.engine.num_in_flight < (1 if self._device.wanted_beside(self) else self._max_in_flight):
            instructions = self.engine.schedule(now_s)
            for load in instructions.loads:
                self._load(load, now_s)
            plan = instructions.plan
            if plan is None:
                return
            adapters = {row.adapter for row in plan.rows if row.adapter is not None}
            ready_s = max((self._loaded_s[digest] for digest in adapters), default=0.0)
            self._planned.append((plan, ready_s, self._seconds(plan, adapters)))

    @property
    def is_busy(self) -> bool:
        return bool(self._planned)

    def start_step(self, now_s: float) -> float | None:
        """Begins the oldest planned step; when it will be done. None: none is planned."""
        if not self._planned:
            return None
        _, ready_s, step_s = self._planned[0]
        self.busy_s += step_s
        self.num_steps += 1
        return max(now_s, ready_s) + step_s

    def collect(self, now_s: float) -> tuple[RequestOutput, ...]:
        """The step under way is done."""
        self._device.step_done()
        plan, _, step_s = self._planned.popleft()
        tokens = tuple(SampledToken(slot=row.slot, token_id=0) for row in plan.rows if row.samples)
        outputs = self.engine.complete(StepResult(step_id=plan.step_id, tokens=tokens, duration_s=step_s), now_s)
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

    def _seconds(self, plan: StepPlan, adapters: set[Digest]) -> float:
        whole_bytes = float(sum(self._table.whole_bytes[self._size_of[digest]] for digest in adapters))
        return self._time.seconds(plan, num_adapters=len(adapters), adapter_bytes=whole_bytes)
