"""Decides which tokens the next step computes, who is admitted, and who gives way.

A step holds one token of every decoding request, then prefill chunks of the running, then newly admitted requests, up
to ``max_step_tokens``; online before offline. Among the waiting of a class the preempted go first, then the smallest
(tenant counter + price of a new adapter); an overdue request pays no price and is not passed. Of requests with equal
prompts one computes the pages and the others wait for them, until they are overdue. Admission takes pages
for all known tokens, so only decoding can run short of pages; then the running request of greatest rank (offline,
latest arrival) is preempted: its pages are released and it is recomputed later, mostly from the prefix cache.

A step may be planned while others are in flight. Then nobody is preempted and nobody runs alone: where that is due the
plan is empty, and the caller asks again when a step is done. A request that ends while a step in flight holds a row of
it keeps slot, pages and adapter until that step is done.

Of a pipeline with several stages each works at a step of its own: a request whose next token is pending waits for it
until the step that samples it is as many steps before as there are stages, and a step takes no more than its share of
the decoding requests, in the order of their adapters, and of ``max_step_tokens``, so that the others make up the steps
beside it.

Knows nothing of tokens' values or outputs; called by ``engine``.
"""

from bisect import insort
from collections import Counter
from collections.abc import Collection, Iterable
from heapq import nsmallest
from itertools import chain
from math import inf
from operator import attrgetter

from loraplex.core.ids import Digest
from loraplex.engine.config import EngineConfig
from loraplex.engine.memory import Memory
from loraplex.engine.prefetch import prefetch_adapters, warm_adapter
from loraplex.engine.quarantine import Quarantine
from loraplex.engine.queue import WaitingQueue
from loraplex.engine.sequence import Sequence
from loraplex.engine.turns import Turns
from loraplex.tenancy.fairness import ServiceCounters

_PREFETCH_DEPTH = 64
"""Heads of the queue, of each class, that are looked at for adapters to load ahead."""


_rank = attrgetter("rank")
_row_order = attrgetter("row_order")


class Scheduler:
    def __init__(self, config: EngineConfig, memory: Memory, *, num_stages: int = 1) -> None:
        self._config = config
        self._memory = memory
        self._num_stages = num_stages
        self._step_tokens = -(-config.max_step_tokens // num_stages)
        self._free_slots = list(range(config.max_running - 1, -1, -1))
        self._releases: list[int] = []
        self._shares: dict[Sequence, int] = {}
        self._budget = 0
        self._preempted = False
        self._blocked = False
        self._in_row_order = True
        self._turns = Turns(config, memory)
        self._num_in_flight = 0
        self._num_planned = 0
        """Steps, without those that were withdrawn or are void."""
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []
        """By rank, least first."""
        self._by_adapter: list[Sequence] = []
        """The running in the order of a step's rows."""
        self._leaving: set[Sequence] = set()
        """Ended, but in a step in flight."""
        self.quarantine = Quarantine()
        self.num_preemptions = 0

    @property
    def counters(self) -> ServiceCounters:
        return self._turns.counters

    def add(self, sequence: Sequence) -> None:
        """Changes state."""
        self.counters.enter(sequence.tenant)
        self._enqueue(sequence)

    def remove(self, sequence: Sequence) -> None:
        """The request ended, for whatever reason: gives back all that it holds, now or in ``left``. Changes state."""
        if sequence.num_in_flight > 0:
            self._take_out(sequence)
            self._leaving.add(sequence)
            return
        if sequence.slot is None:
            self._dequeue(sequence)
        else:
            self._stop(sequence)
        self.counters.leave(sequence.tenant)

    def left(self, sequence: Sequence) -> None:
        """An ended request is in no step any more. Changes state."""
        self._leaving.remove(sequence)
        self._give_back(sequence)
        self.counters.leave(sequence.tenant)

    def plan(self, now_s: float) -> dict[Sequence, int]:
        """Running requests and how many tokens of each the next step computes, sorted by adapter; empty when nothing
        can run before another event or the end of a step in flight. A plan that is not empty is in flight from now on.

        Changes state: admits, preempts, moves adapters.
        """
        self._shares = {}
        self._blocked = self._num_in_flight > 0 and bool(self.quarantine)
        if self._blocked:
            return {}
        self._memory.tick()
        self._preempted = False
        self._in_row_order = True
        self._turns.begin_step()
        self._share_all(now_s)
        if not self._blocked and not self._preempted:
            self._prefetch(now_s)
        if self._blocked or not self._shares:
            self._turns.undo_step()
            return {}
        self._num_in_flight += 1
        self._num_planned += 1
        for sequence in self._shares:
            sequence.last_step = self._num_planned
        return self._shares

    def take_releases(self) -> tuple[int, ...]:
        """Slots that the executor shall close. Changes state."""
        releases = tuple(self._releases)
        self._releases.clear()
        return releases

    def withdraw(self, releases: tuple[int, ...], starting: Iterable[Sequence]) -> None:
        """The executor never saw the last plan: its releases and starts are due again. Changes state."""
        self._forget_last()
        self._releases[:0] = releases
        for sequence in starting:
            sequence.needs_start = True

    def restart(self, releases: Iterable[int], sequences: Collection[Sequence], *, num_steps: int) -> None:
        """The last ``num_steps`` plans failed or are void: their releases are repeated and the slots of their
        ``sequences`` opened anew. Changes state.

        Pages and progress stay: what the steps wrote lies past ``num_computed``.
        """
        for _ in range(num_steps):
            self._forget_last()
        self.quarantine.step_done()
        slots = [sequence.slot for sequence in sequences if sequence.slot is not None]
        # A slot may be due already: its step could not be started, and then the one before it failed.
        self._releases = list(dict.fromkeys((*releases, *slots, *self._releases)))
        for sequence in sequences:
            sequence.needs_start = True

    def run_alone(self, sequence: Sequence) -> None:
        """A new request gets the next step for itself; who is last in the order gives way for it. Changes state."""
        assert self._num_in_flight == 0, "a request was to run alone beside steps in flight"
        self.add(sequence)
        while not self._fits(sequence, reserve=0):
            self._preempt(self.running[-1])
        self._open(sequence)
        self.quarantine.put_first((sequence,))

    def step_done(self) -> None:
        """The oldest step in flight was computed. Changes state."""
        self._num_in_flight -= 1
        self._turns.end_step()
        self.quarantine.step_done()

    def _forget_last(self) -> None:
        self._num_in_flight -= 1
        self._num_planned -= 1
        self._turns.undo_step()

    def _share_all(self, now_s: float) -> None:
        only = self.quarantine.next_set()
        chunks = self._share_decodes(only)
        if self._blocked:
            return
        admitting = only is None and not self._preempted
        for offline in (False, True):
            self._share_prefills(chunks, offline=offline)
            if admitting and not self._preempted and not self._blocked:
                admitting = self._admit_class(now_s, offline=offline)
        if not self._in_row_order:
            self._shares = dict(sorted(self._shares.items(), key=lambda share: share[0].adapter or ""))

    def _share_decodes(self, only: frozenset[Sequence] | None) -> list[Sequence]:
        """One token for everybody who has one, a pending one too. Answers with those who have several, by rank."""
        shares, page_size = self._shares, self._memory.page_size
        chunks: list[Sequence] = []
        most = self._most_decodes() if only is None else None
        for sequence in tuple(self._by_adapter):
            if only is not None and sequence not in only:
                continue
            position, known = sequence.num_scheduled, sequence.num_known
            if known - position > 1:
                chunks.append(sequence)
            elif (
                # Nothing follows the last token that it may have, even while that token is pending.
                known < sequence.max_tokens_total
                and sequence.slot is not None
                and (most is None or (len(shares) < most and not self._waits_for_token(sequence)))
                and (position < len(sequence.pages) * page_size or self._has_room(sequence))
            ):
                shares[sequence] = 1
        self._budget = self._step_tokens - len(shares)
        return sorted(chunks, key=_rank)

    def _waits_for_token(self, sequence: Sequence) -> bool:
        """Its next token will not be on the first stage when the step that is being planned begins there."""
        is_pending = sequence.num_known > len(sequence.token_ids)
        return is_pending and self._num_planned + 1 - sequence.last_step < self._num_stages

    def _most_decodes(self) -> int | None:
        """Decode rows of a step at most; None where the whole model works at one step."""
        if self._num_stages == 1:
            return None
        decoding = sum(sequence.num_known - sequence.num_scheduled <= 1 for sequence in self.running)
        return max(1, -(-decoding // self._num_stages))

    def _has_room(self, sequence: Sequence) -> bool:
        """Makes sure of a page for the next token, preempting from the end of the order; False when it was its turn."""
        while not self._memory.grow(sequence):
            if self._num_in_flight > 0:
                self._blocked = True
                return False
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _share_prefills(self, chunks: list[Sequence], *, offline: bool) -> None:
        for sequence in chunks:
            if self._budget <= 0:
                return
            if sequence.offline is offline and sequence.slot is not None:
                self._share_chunk(sequence)

    def _share_chunk(self, sequence: Sequence) -> None:
        count = min(sequence.num_unscheduled, self._budget)
        self._in_row_order = False
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
            head = min(heads, key=lambda sequence: self._turns.turn(sequence, now_s))
            overdue = self._turns.is_overdue(head, now_s)
            if not overdue and self._is_being_computed(head):
                deferred.add(head)
            elif self._make_way(head):
                self._admit(head)
            elif overdue or self._blocked:
                return False
            else:
                passed.add(head)

    def _prefetch(self, now_s: float) -> None:
        """Loads adapters of those who are next; nobody gives way for that."""
        if not self._memory.max_ahead_pages or not self._memory.adapters.any_loadable or self.quarantine:
            return
        nearest = (
            nsmallest(
                _PREFETCH_DEPTH,
                filter(self._is_ready, self.waiting.heads(offline=offline, without=())),
                key=lambda sequence: self._turns.turn(sequence, now_s),
            )
            for offline in (False, True)
        )
        prefetch_adapters(
            self._memory,
            chain.from_iterable(nearest),
            reserve=self._reserve(len(self.running)),
        )

    def warm(self, digest: Digest, wanted: Collection[Digest]) -> bool:
        """Makes a staged adapter resident, as ``prefetch.warm_adapter`` says. Changes state."""
        return warm_adapter(self._memory, digest, wanted=wanted, reserve=self._reserve(len(self.running)))

    def _is_ready(self, sequence: Sequence) -> bool:
        return sequence.adapter is None or self._memory.adapters.is_ready(sequence.adapter)

    def _is_being_computed(self, sequence: Sequence) -> bool:
        """True while a running request, of no lower class, computes a page that this one would compute again."""
        computing = self._memory.prefix.awaited(sequence)
        return computing is not None and computing.offline <= sequence.offline

    def _make_way(self, sequence: Sequence) -> bool:
        """True when it can be admitted now; an online request may preempt offline ones for that, if it helps and no
        step is in flight."""
        if self._fits(sequence):
            return True
        victims = [] if sequence.offline else [running for running in self.running if running.offline]
        if not victims or self._shortage(sequence, without=victims) > 0:
            return False
        if self._num_in_flight > 0:
            self._blocked = True
            return False
        while not self._fits(sequence):
            self._preempt(victims.pop())
        return True

    def _fits(self, sequence: Sequence, *, reserve: int | None = None) -> bool:
        return bool(self._free_slots) and self._shortage(sequence, reserve=reserve) <= 0

    def _shortage(self, sequence: Sequence, *, without: Collection[Sequence] = (), reserve: int | None = None) -> int:
        if reserve is None:
            reserve = self._reserve(len(self.running) - len(without))
        return self._memory.shortage(sequence, reserve=reserve, without=without)

    @staticmethod
    def _reserve(num_running: int) -> int:
        """Pages left over at an admission, so that the running can grow a while before anybody is preempted."""
        return -(-num_running // 4)

    def _open(self, sequence: Sequence) -> None:
        # Pages and pin first: while it counts as a waiter its adapter cannot leave host memory.
        self._memory.admit(sequence)
        self._dequeue(sequence)
        sequence.slot = self._free_slots.pop()
        sequence.needs_start = True
        insort(self.running, sequence, key=_rank)
        insort(self._by_adapter, sequence, key=_row_order)

    def _admit(self, sequence: Sequence) -> None:
        self._open(sequence)
        self._turns.admit(sequence)
        self._share_chunk(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        sequence.charged_tokens = max(sequence.charged_tokens, sequence.num_computed)
        self._stop(sequence)
        sequence.since_s = -inf
        self._enqueue(sequence)
        self._budget += self._shares.pop(sequence, 0)
        self._preempted = True
        self.num_preemptions += 1

    def _stop(self, sequence: Sequence) -> None:
        self._take_out(sequence)
        self._give_back(sequence)

    def _take_out(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._by_adapter.remove(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        assert sequence.slot is not None, "a request without a slot cannot stop"
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
        holders = [*self.running, *self._leaving]
        slots = [sequence.slot for sequence in holders]
        assert None not in slots
        assert sorted([*self._free_slots, *(s for s in slots if s is not None)]) == list(
            range(self._config.max_running)
        )
        assert self.running == sorted(self.running, key=_rank), "running is out of order"
        assert self._by_adapter == sorted(self.running, key=_row_order), "rows are out of order"
        waiting = list(self.waiting)
        for sequence in self.running:
            sequence.validate(self._memory.page_size)
        assert not any(sequence.slot is not None or sequence.pages for sequence in waiting), "who waits holds something"
        assert self._turns.num_open == self._num_in_flight, "costs of a step were lost"
        assert all(sequence.num_in_flight > 0 for sequence in self._leaving), "an ended request stayed"
        self._memory.validate(holders, waiting)
        self.counters.validate(dict(Counter(sequence.tenant for sequence in (*holders, *waiting))))
