"""Decides which tokens the next step computes, who is admitted, and who gives way.

A step holds one token of every decoding request, then prefill chunks of the running, then newly admitted requests, up
to ``max_step_tokens``; online before offline. Among the waiting of a class the preempted go first, then the smallest
(tenant counter + price of a new adapter); an overdue request pays no price and is not passed. Of requests with equal
prompts one computes the pages and the others wait for them, until they are overdue. Admission takes pages
for all known tokens, so only decoding can run short of pages; then the running request of greatest rank (offline,
latest arrival) is preempted: its pages are released and it is recomputed later, mostly from the prefix cache.

Knows nothing of tokens' values or outputs; called by ``engine``.
"""

from bisect import insort
from collections import Counter, defaultdict, deque
from collections.abc import Collection
from math import inf

from loraplex.core.ids import Digest, TenantName
from loraplex.engine.config import EngineConfig
from loraplex.engine.fairness import TenantCounters
from loraplex.engine.memory import Memory
from loraplex.engine.queue import WaitingQueue
from loraplex.engine.sequence import Sequence


class Scheduler:
    def __init__(self, config: EngineConfig, memory: Memory) -> None:
        self._config = config
        self._memory = memory
        self._free_slots = list(range(config.max_running - 1, -1, -1))
        self._releases: list[int] = []
        self._shares: dict[Sequence, int] = {}
        self._budget = 0
        self._preempted = False
        self._admitted_cost: defaultdict[TenantName, float] = defaultdict(float)
        self._quarantine: deque[frozenset[Sequence]] = deque()
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []
        """By rank, least first."""
        self.counters = TenantCounters()
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Changes state."""
        self.counters.enter(sequence.tenant)
        self._enqueue(sequence)

    def remove(self, sequence: Sequence) -> None:
        """The request ended, for whatever reason: gives back all that it holds. Changes state."""
        if sequence.slot is None:
            self._dequeue(sequence)
        else:
            self._stop(sequence)
        self.counters.leave(sequence.tenant)

    def plan(self, now_s: float) -> dict[Sequence, int]:
        """Running requests and how many tokens of each the next step computes; empty when nothing can run.

        Changes state: admits, preempts, moves adapters.
        """
        self._memory.tick()
        self._shares = {}
        self._budget = self._config.max_step_tokens
        self._preempted = False
        self._admitted_cost.clear()
        only = self._next_quarantined()
        self._share_decodes(only)
        admitting = only is None and not self._preempted
        for offline in (False, True):
            self._share_prefills(only, offline=offline)
            if admitting and not self._preempted:
                admitting = self._admit_class(now_s, offline=offline)
        return self._shares

    def take_releases(self) -> tuple[int, ...]:
        """Slots that the executor shall close. Changes state."""
        releases = tuple(self._releases)
        self._releases.clear()
        return releases

    def withdraw(self, releases: tuple[int, ...], starting: list[Sequence]) -> None:
        """The executor never saw the last plan: its releases and starts are due again. Changes state."""
        self._releases[:0] = releases
        for sequence in starting:
            sequence.needs_start = True

    def restart(self, releases: tuple[int, ...], sequences: list[Sequence]) -> None:
        """The executor failed within a plan: its releases are repeated and its slots opened anew. Changes state.

        Pages and progress stay: what the step wrote lies past ``num_computed``.
        """
        slots = [sequence.slot for sequence in sequences if sequence.slot is not None]
        self._releases[:0] = dict.fromkeys((*releases, *slots))
        for sequence in sequences:
            sequence.needs_start = True

    def isolate(self, sequences: list[Sequence]) -> None:
        """A step of these failed: run smaller sets alone until the culprit is found. Changes state.

        First apart by adapter, then by halves: one poisoned request or adapter costs a logarithm of steps, and
        nobody else fails with it.
        """
        by_adapter: dict[str, list[Sequence]] = {}
        for sequence in sequences:
            by_adapter.setdefault(sequence.adapter or "", []).append(sequence)
        if len(by_adapter) > 1:
            parts = list(by_adapter.values())
        else:
            middle = len(sequences) // 2
            parts = [sequences[:middle], sequences[middle:]]
        self._quarantine.extendleft(frozenset(part) for part in reversed(parts))

    def run_alone(self, sequence: Sequence) -> None:
        """A new request gets the next step for itself; who is last in the order gives way for it. Changes state."""
        self.add(sequence)
        while not self._fits(sequence, reserve=0):
            self._preempt(self.running[-1])
        self._open(sequence)
        self._quarantine.appendleft(frozenset((sequence,)))

    def step_done(self) -> None:
        """The last planned step ended, well or not: a quarantined set has had its turn. Changes state."""
        if self._quarantine:
            self._quarantine.popleft()

    def _next_quarantined(self) -> frozenset[Sequence] | None:
        while self._quarantine:
            alive = frozenset(sequence for sequence in self._quarantine[0] if sequence.slot is not None)
            if alive:
                return alive
            self._quarantine.popleft()
        return None

    def _share_decodes(self, only: frozenset[Sequence] | None) -> None:
        for sequence in tuple(self.running):
            if sequence.slot is None or sequence.num_uncomputed != 1 or (only is not None and sequence not in only):
                continue
            if self._has_room(sequence):
                self._shares[sequence] = 1
                self._budget -= 1

    def _has_room(self, sequence: Sequence) -> bool:
        """Makes sure of a page for the next token, preempting from the end of the order; False when it was its turn."""
        while len(sequence.pages) * self._memory.page_size <= sequence.num_computed:
            if self._memory.grow(sequence):
                continue
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _share_prefills(self, only: frozenset[Sequence] | None, *, offline: bool) -> None:
        for sequence in self.running:
            if self._budget <= 0:
                return
            if (
                sequence.offline is not offline
                or sequence in self._shares
                or (only is not None and sequence not in only)
            ):
                continue
            self._share_chunk(sequence)

    def _share_chunk(self, sequence: Sequence) -> None:
        count = min(sequence.num_uncomputed, self._budget)
        self._shares[sequence] = count
        self._budget -= count

    def _admit_class(self, now_s: float, *, offline: bool) -> bool:
        """Admits while budget and pages last; False when somebody ready is left, so that a lower class must wait."""
        passed: set[Sequence] = set()
        deferred: set[Sequence] = set()
        while True:
            heads = [
                head
                for head in self.waiting.heads(offline=offline, without=deferred)
                if self._is_ready(head) and head not in passed
            ]
            if not heads:
                return not passed
            if self._budget <= 0:
                return False
            head = min(heads, key=lambda sequence: self._turn(sequence, now_s))
            overdue = self._is_overdue(head, now_s)
            if not overdue and self._is_being_computed(head):
                deferred.add(head)
            elif self._make_way(head):
                self._admit(head)
            elif overdue:
                return False
            else:
                passed.add(head)

    def _is_ready(self, sequence: Sequence) -> bool:
        return sequence.adapter is None or self._memory.adapters.is_ready(sequence.adapter)

    def _is_being_computed(self, sequence: Sequence) -> bool:
        """True while a running request, of no lower class, computes a page that this one would compute again."""
        computing = self._memory.prefix.awaited(sequence)
        return computing is not None and computing.offline <= sequence.offline

    def _is_overdue(self, sequence: Sequence, now_s: float) -> bool:
        return sequence.since_s + self._config.overdue_s <= now_s

    def _turn(self, sequence: Sequence, now_s: float) -> tuple[float, tuple[bool, float, int]]:
        """Who is least goes next. What was admitted in this plan counts already, though its tokens are yet to be
        computed: otherwise the tenant that is least at the start of a step would take all that is free."""
        if sequence.since_s == -inf:
            return -inf, sequence.rank
        score = self.counters.value(sequence.tenant) + self._admitted_cost[sequence.tenant]
        if sequence.adapter is not None and not self._is_overdue(sequence, now_s):
            score += self._price(sequence.adapter)
        return score, sequence.rank

    def _price(self, adapter: Digest) -> float:
        adapters = self._memory.adapters
        return 0.0 if adapters.num_users(adapter) else adapters.num_pages(adapter) * self._config.adapter_page_price

    def _make_way(self, sequence: Sequence) -> bool:
        """True when it can be admitted now; an online request may preempt offline ones for that, if it helps."""
        if self._fits(sequence):
            return True
        victims = [] if sequence.offline else [running for running in self.running if running.offline]
        if not victims or self._shortage(sequence, without=victims) > 0:
            return False
        while not self._fits(sequence):
            self._preempt(victims.pop())
        return True

    def _fits(self, sequence: Sequence, *, reserve: int | None = None) -> bool:
        return bool(self._free_slots) and self._shortage(sequence, reserve=reserve) <= 0

    def _shortage(self, sequence: Sequence, *, without: Collection[Sequence] = (), reserve: int | None = None) -> int:
        if reserve is None:
            # Some pages are left over at an admission, so that the running can grow a while before anybody is
            # preempted.
            reserve = -(-(len(self.running) - len(without)) // 4)
        return self._memory.shortage(sequence, reserve=reserve, without=without)

    def _open(self, sequence: Sequence) -> None:
        # Pages and pin first: while it counts as a waiter its adapter cannot leave host memory.
        self._memory.admit(sequence)
        self._dequeue(sequence)
        sequence.slot = self._free_slots.pop()
        sequence.needs_start = True
        insort(self.running, sequence, key=lambda s: s.rank)

    def _admit(self, sequence: Sequence) -> None:
        self._open(sequence)
        uncharged = len(sequence.token_ids) - max(sequence.num_computed, sequence.charged_tokens)
        self._admitted_cost[sequence.tenant] += (
            max(0, uncharged) * self._config.prefill_token_cost + self._config.decode_token_cost
        )
        self._share_chunk(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        self._stop(sequence)
        sequence.since_s = -inf
        self._enqueue(sequence)
        self._budget += self._shares.pop(sequence, 0)
        self._preempted = True
        self.num_preemptions += 1

    def _stop(self, sequence: Sequence) -> None:
        assert sequence.slot is not None, "a request without a slot cannot stop"
        self.running.remove(sequence)
        if not sequence.needs_start:
            self._releases.append(sequence.slot)
        self._free_slots.append(sequence.slot)
        sequence.slot = None
        sequence.needs_start = False
        self._memory.release(sequence)

    def _enqueue(self, sequence: Sequence) -> None:
        self.waiting.push(sequence)
        if sequence.adapter is not None:
            self._memory.adapters.add_waiter(sequence.adapter)

    def _dequeue(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        if sequence.adapter is not None:
            self._memory.adapters.remove_waiter(sequence.adapter)

    def validate(self) -> None:
        """Raises AssertionError on a broken invariant of queues, slots or pages."""
        self.waiting.validate()
        slots = [sequence.slot for sequence in self.running]
        assert None not in slots
        assert sorted([*self._free_slots, *(s for s in slots if s is not None)]) == list(
            range(self._config.max_running)
        )
        assert self.running == sorted(self.running, key=lambda s: s.rank), "running is out of order"
        waiting = list(self.waiting)
        for sequence in self.running:
            assert 0 <= sequence.num_computed < len(sequence.token_ids)
            assert sequence.num_computed <= len(sequence.pages) * self._memory.page_size
            assert sequence.num_sealed <= sequence.num_computed // self._memory.page_size
        for sequence in waiting:
            assert sequence.slot is None, "a waiting request holds a slot"
            assert not sequence.pages, "a waiting request holds pages"
        self._memory.validate(self.running, waiting)
        self.counters.validate(dict(Counter(sequence.tenant for sequence in (*self.running, *waiting))))
