"""The cluster on a virtual clock, decided by the real parts: ``engine.Engine`` and the router's policies.

What is modelled is time alone: a step takes what the cost model says, an adapter load what its bytes take on the host
link. One router; its messages and those of the replicas take no time. Slow (some thousand requests a second): the
yardstick of ``fast``, and for a last look at a plan.
"""

import heapq
from collections import deque
from collections.abc import Hashable
from enum import IntEnum
from math import inf

import numpy as np

from loraplex.core.adapter import AdapterRef
from loraplex.core.errors import InvalidInput
from loraplex.core.ids import Digest, RequestId, TenantName
from loraplex.core.request import EngineRequest, RequestOutput, SamplingParams
from loraplex.router.policy import Choice, Demand, hash64, wait_in_queue_s
from loraplex.router.prediction import OutputLength
from loraplex.router.queue import Ticket, WaitingQueue
from loraplex.router.rivals import routing_policy
from loraplex.simulator.cluster import Cluster
from loraplex.simulator.exact_replica import Device, VirtualReplica
from loraplex.simulator.results import Happened, result_of
from loraplex.simulator.types import Outcome, Serving, SimulationInput, SimulationResult
from loraplex.simulator.unbatched import simulate_unbatched_exact
from loraplex.simulator.workload import Workload
from loraplex.tenancy.fairness import ServiceCounters


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
        self._policies = [routing_policy(given.router) for _ in cluster.bases]
        self._arrivals = workload.arrivals
        self._devices = [Device() for _ in given.plan.groups]
        self._replicas = [
            VirtualReplica(given, workload, cluster, index, self._devices[replica.group], started=self._step_started)
            for index, replica in enumerate(cluster.replicas)
        ]
        self._counters = [ServiceCounters() for _ in cluster.bases]
        self._rooms: list[WaitingQueue[int]] = [WaitingQueue(counters) for counters in self._counters]
        self._expected: dict[int, tuple[float, float, float]] = {}
        """Of the placed: GPU seconds that they were predicted to take, of these for the prompt, and for each token."""
        self._events: list[tuple[float, _Kind, int, int]] = []
        self._order = 0
        count = len(workload)
        self._first_s = np.full(count, np.inf)
        self._end_s = np.full(count, np.inf)
        self._num_output = np.zeros(count, dtype=np.int32)
        self._outcome = np.full(count, Outcome.SERVED, dtype=np.int8)
        self._replica_of = np.full(count, -1, dtype=np.int32)
        self._lengths = [OutputLength(given.router.expected_output_tokens) for _ in cluster.bases]
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
        room, router = self._room(row), self._given.router
        patience_s = inf if router.ttft_slo_s is None else router.ttft_slo_s * router.ttft_patience
        choice = self._choose(row)
        first_s = choice.first_s if choice is not None else self._wait_s(row)
        full = choice is None and len(room) + 1 > router.max_queued_requests
        victim = room.makes_way(self._tenant(row)) if full else None
        if first_s > patience_s or (full and victim is None):
            self._outcome[row] = Outcome.REFUSED
            return
        if victim is not None:
            self._expire(victim)
        self._account(row).enter(self._tenant(row))
        if choice is not None:
            self._place(row, choice, now_s)
        else:
            room.push(row, Ticket(tenant=self._tenant(row), order=row, only=int(self._cluster.request_key[row])))
            self._push(now_s + min(router.max_queue_wait_s, patience_s), _Kind.EXPIRED, row)

    def _choose(self, row: int) -> Choice | None:
        views = [self._replicas[index].view for index, _ in self._candidates(row)]
        policy = self._policies[int(self._cluster.request_base[row])]
        return policy(views, self._demand(row), self._given.router)

    def _wait_s(self, row: int) -> float:
        """As ``router.pool`` predicts it while no candidate has a credit."""
        views = [self._replicas[index].view for index, _ in self._candidates(row)]
        return wait_in_queue_s(views, self._demand(row), self._room(row).num_ahead(self._tenant(row)))

    def _place(self, row: int, choice: Choice, now_s: float) -> None:
        index = self._index_of[choice.view.replica_id]
        replica, view, output = self._replicas[index], choice.view, self._length(row).expected
        try:
            replica.add(self._request(row, now_s), now_s)
        except InvalidInput:
            self._outcome[row] = Outcome.IMPOSSIBLE
            self._account(row).leave(self._tenant(row))
            return
        self._replica_of[row] = index
        token_s = view.decode_s(output) / view.rows
        prompt_s = view.rates.token_s * int(self._arrivals.prompt_tokens[row])
        self._expected[row] = prompt_s + output * token_s, prompt_s, token_s
        self._account(row).expect(self._tenant(row), prompt_s + output * token_s)
        self._fetch(index, now_s)
        if replica.engine.num_in_flight == 0:
            self._replicas[index].plan(now_s)

    def _fetch(self, index: int, now_s: float) -> None:
        for digest, ready_s in self._replicas[index].fetch(now_s):
            self._fetching[index].append(digest)
            self._push(ready_s, _Kind.STAGED, index)

    def _step_started(self, index: int, done_s: float) -> None:
        self._push(done_s, _Kind.STEP_DONE, index)

    def _step_done(self, index: int, now_s: float) -> None:
        self._take(self._replicas[index].collect(now_s), now_s)
        self._replicas[index].plan(now_s)
        self._pump(self._cluster.replicas[index].base, index, now_s)

    def _staged(self, index: int, now_s: float) -> None:
        outputs = self._replicas[index].staged(self._fetching[index].popleft(), now_s)
        self._take(outputs, now_s)
        if self._replicas[index].engine.num_in_flight == 0:
            self._replicas[index].plan(now_s)

    def _take(self, outputs: tuple[RequestOutput, ...], now_s: float) -> None:
        for output in outputs:
            row = int(output.request_id)
            if output.tokens and self._num_output[row] == 0:
                self._first_s[row] = now_s
            self._num_output[row] += len(output.tokens)
            if output.finish_reason is not None:
                if output.error is not None:
                    self._outcome[row] = Outcome.IMPOSSIBLE
                else:
                    self._end_s[row] = now_s
                    self._length(row).ended(int(self._num_output[row]))
                self._replicas[self._replica_of[row]].ended(self._digest(row), int(self._arrivals.prompt_tokens[row]))
                expected_s, prompt_s, token_s = self._expected.pop(row)
                account, tenant = self._account(row), self._tenant(row)
                account.expect(tenant, -expected_s)
                account.charge(tenant, prompt_s + int(self._num_output[row]) * token_s)
                account.leave(tenant)

    def _pump(self, base: int, index: int, now_s: float) -> None:
        """A replica has news: those that wait and may run there try again, in order, until one finds no room."""
        room, view = self._rooms[base], self._replicas[index].view
        while len(room) and view.credits > 0:
            row = room.next(lambda key: self._may_run(key, index))
            choice = None if row is None else self._choose(row)
            if row is None or choice is None:
                return
            room.remove(row)
            self._place(row, choice, now_s)

    def _expire(self, row: int) -> None:
        if self._room(row).remove(row):
            self._outcome[row] = Outcome.REFUSED
            self._account(row).leave(self._tenant(row))

    def _push(self, at_s: float, kind: _Kind, subject: int) -> None:
        self._order += 1
        heapq.heappush(self._events, (at_s, kind, self._order, subject))

    def _room(self, row: int) -> WaitingQueue[int]:
        return self._rooms[int(self._cluster.request_base[row])]

    def _account(self, row: int) -> ServiceCounters:
        return self._counters[int(self._cluster.request_base[row])]

    def _length(self, row: int) -> OutputLength:
        return self._lengths[int(self._cluster.request_base[row])]

    def _tenant(self, row: int) -> TenantName:
        tenant = int(self._arrivals.tenant[row])
        return TenantName(self._arrivals.tenants[tenant] if tenant >= 0 else "")

    def _candidates(self, row: int) -> list[tuple[int, float]]:
        return self._candidates_of(int(self._cluster.request_key[row]))

    def _may_run(self, key: Hashable, index: int) -> bool:
        return isinstance(key, int) and any(candidate == index for candidate, _ in self._candidates_of(key))

    def _candidates_of(self, key: int) -> list[tuple[int, float]]:
        first, end = self._cluster.first_candidate[key : key + 2]
        return list(
            zip(self._cluster.candidates[first:end].tolist(), self._cluster.weights[first:end].tolist(), strict=True)
        )

    def _digest(self, row: int) -> Digest | None:
        adapter = int(self._arrivals.adapter[row])
        return None if adapter < 0 else Digest(self._workload.adapter_keys[adapter])

    def _demand(self, row: int) -> Demand:
        """As the router sees it; no two prompts are alike, so each has a key of its own."""
        digest = self._digest(row)
        by_request = digest is None or self._cluster.is_listed[self._cluster.request_key[row]]
        return Demand(
            key=row if by_request or digest is None else hash64(digest.encode()),
            prompt_tokens=int(self._arrivals.prompt_tokens[row]),
            output_tokens=self._length(row).expected,
            digest=digest,
            weights={self._replicas[index].replica_id: weight for index, weight in self._candidates(row)},
        )

    def _request(self, row: int, now_s: float) -> EngineRequest:
        arrivals = self._arrivals
        name = self._tenant(row)
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
