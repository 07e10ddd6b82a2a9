"""Whose turn it is to be admitted: by what each tenant has had, and what its adapter would cost.

Owns the tenants' counters and what the steps in flight admitted. Called by the scheduler.
"""

from collections import defaultdict, deque
from math import inf

from loraplex.core.ids import Digest, TenantName
from loraplex.engine.config import EngineConfig
from loraplex.engine.memory import Memory
from loraplex.engine.sequence import Sequence
from loraplex.tenancy.fairness import ServiceCounters


class Turns:
    def __init__(self, config: EngineConfig, memory: Memory) -> None:
        self._config = config
        self._adapters = memory.adapters
        self._page_price = config.adapter_token_price * memory.page_size
        self._admitted: deque[defaultdict[TenantName, float]] = deque()
        """Of each step in flight, and last of the one being planned: what its newly admitted cost, not yet charged."""
        self.counters = ServiceCounters()

    @property
    def num_open(self) -> int:
        """Steps that began and did not end."""
        return len(self._admitted)

    def begin_step(self) -> None:
        self._admitted.append(defaultdict(float))

    def undo_step(self) -> None:
        """The last one that began."""
        self._admitted.pop()

    def end_step(self) -> None:
        """The oldest: its costs are charged."""
        self._admitted.popleft()

    def admit(self, sequence: Sequence) -> None:
        """In the step that began last."""
        uncharged = len(sequence.token_ids) - max(sequence.num_computed, sequence.charged_tokens)
        cost = max(0, uncharged) * self._config.prefill_token_cost + self._config.decode_token_cost
        self._admitted[-1][sequence.tenant] += cost / sequence.request.weight

    def is_overdue(self, sequence: Sequence, now_s: float) -> bool:
        return sequence.since_s + self._config.overdue_s <= now_s

    def turn(self, sequence: Sequence, now_s: float) -> tuple[float, tuple[bool, float, int]]:
        """Who is least goes next. What this plan and those in flight admit counts already, though its tokens are yet to
        be computed: otherwise the tenant that is least at the start of a step would take all that is free."""
        if sequence.since_s == -inf:
            return -inf, sequence.rank
        score = self.counters.value(sequence.tenant)
        score += sum(costs.get(sequence.tenant, 0.0) for costs in self._admitted)
        if sequence.adapter is not None and not self.is_overdue(sequence, now_s):
            score += self._price(sequence.adapter)
        return score, sequence.rank

    def _price(self, adapter: Digest) -> float:
        if self._adapters.num_users(adapter):
            return 0.0
        return self._adapters.num_pages(adapter) * self._page_price
