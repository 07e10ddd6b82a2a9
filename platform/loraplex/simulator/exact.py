"""The cluster on a virtual clock, decided by the real parts: ``engine.Engine`` and ``router.policy.choose_replica``.

What is modelled is time alone: a step takes what the cost model says, an adapter load what its bytes take on the host
link. One router; its messages and those of the replicas take no time. Slow (some thousand requests a second): the
yardstick of ``fast``, and for a last look at a plan.
"""

import heapq
from collections import deque
from enum import IntEnum

import numpy as np

from loraplex.core.adapter import AdapterRef
from loraplex.core.errors import InvalidInput
from loraplex.core.ids import Digest, RequestId, TenantName
from loraplex.core.request import EngineRequest, RequestOutput, SamplingParams
from loraplex.router.policy import Demand, choose_replica, hash64
from loraplex.router.prediction import OutputLengths
from loraplex.simulator.cluster import Cluster
from loraplex.simulator.exact_replica import Device, VirtualReplica
from loraplex.simulator.results import Happened, result_of
from loraplex.simulator.types import Outcome, Serving, SimulationInput, SimulationResult
from loraplex.simulator.unbatched import simulate_unbatched_exact
from loraplex.simulator.waiting_room import WaitingRoom
from loraplex.simulator.workload import Workload


class _Kind(IntEnum):
    """Of events; at the same moment in this order."""

    STAGED = 0
    STEP_DONE = 1
    EXPIRED = 2


def simulate_exact(given: SimulationInput, workload: Workload | None = None) -> SimulationResult:
    """Runs the whole trace, to the last token. ``workload``: of ``given.arrivals``, to save making it again.

    InvalidInput as ``Workload.of`` and ``Cluster.of``.
    """
    workload = workload or Workload.of(given.arrivals, given.adapters)
    cluster = Cluster.of(given, workload)
    if given.serving is Serving.UNBATCHED:
        happened = simulate_unbatched_exact(given, workload, cluster)
    else:
        happened = _Run(given, workload, cluster).run()
    return result_of(given, workload, cluster, happened)


class _Run:
    def __init__(self, given: SimulationInput, workload: Workload, cluster: Cluster) -> None:
        self._given, self._workload, self._cluster = given, workload, cluster
        self._arrivals = workload.arrivals
        self._devices = [Device() for _ in given.plan.groups]
        self._replicas = [
            VirtualReplica(given, workload, cluster, index, self._devices[replica.group])
            for index, replica in enumerate(cluster.replicas)
        ]
        self._rooms = [WaitingRoom() for _ in cluster.bases]
        self._events: list[tuple[float, _Kind, int, int]] = []
        self._order = 0
        count = len(workload)
        self._first_s = np.full(count, np.inf)
        self._end_s = np.full(count, np.inf)
        self._num_output = np.zeros(count, dtype=np.int32)
        self._outcome = np.full(count, Outcome.SERVED, dtype=np.int8)
        self._replica_of = np.full(count, -1, dtype=np.int32)
        self._lengths = OutputLengths(given.router.expected_output_tokens)
        self._index_of = {replica.replica_id: index for index, replica in enumerate(self._replicas)}
        self._fetching: list[deque[Digest]] = [deque() for _ in self._replicas]

    def run(self) -> Happened:
        arrival_s = self._arrivals.arrival_s
        position, count = 0, len(arrival_s)
        while position < count or self._events:
            if position < count and (not self._events or arrival_s[position] <= self._events[0][0]):
                self._arrive(position, float(arrival_s[position]))
                position += 1
            else:
                now_s, kind, _, subject = heapq.heappop(self._events)
                if kind is _Kind.STEP_DONE:
                    self._step_done(subject, now_s)
                elif kind is _Kind.STAGED:
                    self._staged(subject, now_s)
                else:
                    self._expire(subject)
        replicas = self._replicas
        return Happened(
            first_s=self._first_s,
            end_s=self._end_s,
            num_output=self._num_output,
            outcome=self._outcome,
            replica=self._replica_of,
            busy_s=np.array([replica.busy_s for replica in replicas]),
            num_steps=np.array([replica.num_steps for replica in replicas]),
            num_preemptions=np.array([replica.engine.num_preemptions for replica in replicas]),
            num_loads=np.array([replica.num_loads for replica in replicas]),
            load_bytes=np.array([replica.load_bytes for replica in replicas], dtype=np.float64),
        )

    def _arrive(self, row: int, now_s: float) -> None:
        if not len(self._candidates(row)):
            self._outcome[row] = Outcome.IMPOSSIBLE
            return
        room = self._room(row)
        if len(room) or not self._place(row, now_s):
            if len(room) + 1 > self._given.router.max_queued_requests:
                self._outcome[row] = Outcome.REFUSED
            else:
                room.push(row, self._tenant(row))
                self._push(now_s + self._given.router.max_queue_wait_s, _Kind.EXPIRED, row)

    def _place(self, row: int, now_s: float) -> bool:
        request = self._request(row, now_s)
        candidates = self._candidates(row)
        views = [self._replicas[index].view for index, _ in candidates]
        choice = choose_replica(views, self._demand(row, candidates), self._given.router)
        if choice is None:
            return False
        index = next(i for i, _ in candidates if self._replicas[i].view is choice.view)
        replica = self._replicas[index]
        try:
            replica.add(request, now_s)
        except InvalidInput:
            self._outcome[row] = Outcome.IMPOSSIBLE
            return True
        self._replica_of[row] = index
        self._room(row).placed(self._tenant(row), 1)
        self._fetch(index, now_s)
        if replica.engine.num_in_flight == 0:
            self._plan(index, now_s)
        return True

    def _fetch(self, index: int, now_s: float) -> None:
        for digest, ready_s in self._replicas[index].fetch(now_s):
            self._fetching[index].append(digest)
            self._push(ready_s, _Kind.STAGED, index)

    def _plan(self, index: int, now_s: float) -> None:
        """Where a step is under way this waits for its end, as ``replica.driver`` does."""
        self._replicas[index].plan(now_s)
        started = self._devices[self._cluster.replicas[index].group].start_next(now_s)
        if started is not None:
            replica, done_s = started
            self._push(done_s, _Kind.STEP_DONE, replica.index)

    def _step_done(self, index: int, now_s: float) -> None:
        self._take(self._replicas[index].collect(now_s), now_s)
        self._plan(index, now_s)
        self._pump(self._cluster.replicas[index].base, index, now_s)

    def _staged(self, index: int, now_s: float) -> None:
        outputs = self._replicas[index].staged(self._fetching[index].popleft(), now_s)
        self._take(outputs, now_s)
        if self._replicas[index].engine.num_in_flight == 0:
            self._plan(index, now_s)

    def _take(self, outputs: tuple[RequestOutput, ...], now_s: float) -> None:
        for output in outputs:
            row = int(output.request_id)
            if output.tokens and self._num_output[row] == 0:
                self._first_s[row] = now_s
            self._num_output[row] += len(output.tokens)
            if output.finish_reason is not None:
                base = self._cluster.bases[self._cluster.request_base[row]]
                if output.error is not None:
                    self._outcome[row] = Outcome.IMPOSSIBLE
                else:
                    self._end_s[row] = now_s
                    self._lengths.ended(base, int(self._num_output[row]))
                self._replicas[self._replica_of[row]].ended(self._digest(row), int(self._arrivals.prompt_tokens[row]))
                self._room(row).placed(self._tenant(row), -1)

    def _pump(self, base: int, index: int, now_s: float) -> None:
        """A replica has news: those that wait and may run there try again, in order, until one finds no room."""
        room = self._rooms[base]
        if not len(room) or self._replicas[index].credits <= 0:
            return
        for row in room.in_order():
            if any(i == index for i, _ in self._candidates(row)):
                if not self._place(row, now_s):
                    return
                room.remove(row)
                # Who is next depends on what runs.
                self._pump(base, index, now_s)
                return

    def _expire(self, row: int) -> None:
        if self._room(row).remove(row):
            self._outcome[row] = Outcome.REFUSED

    def _push(self, at_s: float, kind: _Kind, subject: int) -> None:
        self._order += 1
        heapq.heappush(self._events, (at_s, kind, self._order, subject))

    def _room(self, row: int) -> WaitingRoom:
        return self._rooms[int(self._cluster.request_base[row])]

    def _tenant(self, row: int) -> int:
        return int(self._arrivals.tenant[row])

    def _candidates(self, row: int) -> list[tuple[int, float]]:
        key = self._cluster.request_key[row]
        first, end = self._cluster.first_candidate[key : key + 2]
        return list(
            zip(self._cluster.candidates[first:end].tolist(), self._cluster.weights[first:end].tolist(), strict=True)
        )

    def _digest(self, row: int) -> Digest | None:
        adapter = int(self._arrivals.adapter[row])
        return None if adapter < 0 else Digest(self._workload.adapter_keys[adapter])

    def _demand(self, row: int, candidates: list[tuple[int, float]]) -> Demand:
        """As the router sees it; no two prompts are alike, so each has a key of its own."""
        digest = self._digest(row)
        by_request = digest is None or self._cluster.is_listed[self._cluster.request_key[row]]
        return Demand(
            key=row if by_request or digest is None else hash64(digest.encode()),
            prompt_tokens=int(self._arrivals.prompt_tokens[row]),
            output_tokens=self._lengths.expected(self._cluster.bases[self._cluster.request_base[row]]),
            digest=digest,
            absence_s=lambda view: self._replicas[self._index_of[view.replica_id]].absence_s(digest or Digest("")),
            weights={self._replicas[index].replica_id: weight for index, weight in candidates},
        )

    def _request(self, row: int, now_s: float) -> EngineRequest:
        arrivals = self._arrivals
        tenant = int(arrivals.tenant[row])
        name = TenantName(arrivals.tenants[tenant] if tenant >= 0 else "")
        base = self._cluster.bases[self._cluster.request_base[row]]
        model = next(r.cost.model for r in self._cluster.replicas if r.base == self._cluster.request_base[row])
        digest, ref = self._digest(row), None
        if digest is not None:
            adapter = arrivals.adapters[int(arrivals.adapter[row])]
            ref = AdapterRef(tenant=name, name=adapter.name, version=1, digest=digest)
        return EngineRequest(
            request_id=RequestId(str(row)),
            tenant=name,
            base_model_id=base,
            adapter=ref,
            prompt_token_ids=_prompt(row, int(arrivals.prompt_tokens[row]), model.vocab_size),
            sampling=SamplingParams(max_tokens=int(arrivals.output_tokens[row]), seed=0, ignore_eos=True),
            arrival_s=now_s,
            cache_salt=str(row),
        )


def _prompt(row: int, length: int, vocab_size: int) -> tuple[int, ...]:
    """Begins with the digits of ``row``, so that the router tells prompts apart; no two share KV (by their salts)."""
    digits = []
    for _ in range(min(length, 4)):
        row, digit = divmod(row, vocab_size)
        digits.append(digit)
    return (*digits, *([0] * (length - len(digits))))
