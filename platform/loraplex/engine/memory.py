"""Decides who gives way when pages are short: KV of finished requests and idle adapters share one order of last use.

Joins PagePool, PrefixCache and AdapterResidency; keeps the instructions that follow from loads and drops. Knows
nothing of queues or budgets; called by ``scheduler``.
"""

from collections import Counter
from collections.abc import Collection, Iterable

from loraplex.core.errors import BadConfig
from loraplex.core.ids import Digest
from loraplex.core.model import ModelSpec
from loraplex.core.step import ArenaSpec
from loraplex.engine.adapters import AdapterResidency
from loraplex.engine.config import EngineConfig
from loraplex.engine.instructions import AdapterLoad
from loraplex.engine.pages import PagePool
from loraplex.engine.prefix import PrefixCache
from loraplex.engine.sequence import Sequence


class Memory:
    def __init__(self, config: EngineConfig, *, model: ModelSpec, arena: ArenaSpec) -> None:
        self.page_size = arena.page_size
        self.max_adapter_pages = arena.num_pages
        if config.max_adapter_bytes is not None:
            if config.max_adapter_bytes < arena.page_bytes:
                raise BadConfig(f"a page of the arena has {arena.page_bytes} bytes", param="max_adapter_bytes")
            self.max_adapter_pages = min(config.max_adapter_bytes // arena.page_bytes, arena.num_pages)
        self.max_ahead_pages = -(-config.max_ahead_bytes // arena.page_bytes)
        self.pool = PagePool(arena.num_pages)
        self.adapters = AdapterResidency(self.pool, max_host_pages=config.max_host_bytes // arena.page_bytes)
        self.prefix = PrefixCache(
            self.pool, page_size=arena.page_size, base_model_id=model.base_model_id, enabled=config.prefix_cache
        )
        self.last_done_step = 0
        """Id of the last step that ended."""
        self.num_adapter_hits = 0
        """Admissions that found their adapter resident."""
        self.num_cached_tokens = 0
        """Prompt tokens found in the prefix cache, at each request's first admission."""
        self._stamp = 0
        self._drops: dict[Digest, None] = {}
        self._loads: dict[Digest, tuple[int, ...]] = {}

    @property
    def num_available(self) -> int:
        """Pages that are free or can be had at once."""
        return self.pool.num_free + self.pool.num_cached + self.adapters.num_idle_pages

    def num_pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def tick(self) -> None:
        """A new step: what is used from now on is younger. Changes state."""
        self._stamp += 1

    def shortage(self, sequence: Sequence, *, reserve: int, without: Collection[Sequence] = ()) -> int:
        """Pages that are missing to admit ``sequence`` and leave ``reserve`` over, of the arena or of the adapters'
        share; 0 or less when it fits.

        ``without``: running ones that are thought away.
        """
        adapters = self.adapters
        shared = self.prefix.match(sequence)
        needed = self.num_pages_for(len(sequence.token_ids)) - len(shared) + reserve
        available = self.num_available - sum(1 for page in shared if self.pool.is_cached(page))
        over_share = 0
        freed_adapters = self._num_freed_adapter_pages(without, keep=sequence.adapter)
        if sequence.adapter is not None:
            to_load = adapters.num_pages_to_load(sequence.adapter)
            needed += to_load
            available -= adapters.idle_pages_of(sequence.adapter)
            if to_load:
                in_use = adapters.num_resident_pages - adapters.num_idle_pages - freed_adapters
                over_share = in_use + to_load - self.max_adapter_pages
        missing = needed - available - freed_adapters - self._num_freed_pages(without, keep=frozenset(shared))
        return max(missing, over_share)

    def _num_freed_pages(self, sequences: Collection[Sequence], *, keep: frozenset[int]) -> int:
        """Pages of KV that nobody else uses: a shared prefix comes free with its last user only."""
        held = Counter(page for sequence in sequences for page in sequence.pages)
        return sum(self.pool.num_references(page) == count for page, count in held.items() if page not in keep)

    def _num_freed_adapter_pages(self, sequences: Collection[Sequence], *, keep: Digest | None) -> int:
        """Pages of adapters that nobody else uses."""
        users = Counter(sequence.adapter for sequence in sequences if sequence.adapter not in (None, keep))
        idle = (d for d, count in users.items() if d is not None and self.adapters.num_users(d) == count)
        return sum(map(self.adapters.num_pages, idle))

    def admit(self, sequence: Sequence) -> None:
        """Gives pages for all known tokens, makes the adapter resident and pins it. Changes state.

        ``shortage`` was 0 or less.
        """
        shared = self.prefix.match(sequence)
        for page in shared:
            self.pool.share(page)
        digest = sequence.adapter
        if digest is not None:
            if self.adapters.num_pages_to_load(digest):
                self.load_adapter(digest, ahead=False)
            else:
                self.num_adapter_hits += 1
            self.adapters.pin(digest)
        count = self.num_pages_for(len(sequence.token_ids)) - len(shared)
        sequence.pages = [*shared, *self._take(count)]
        sequence.num_computed = sequence.num_scheduled = len(shared) * self.page_size
        sequence.num_sealed = len(shared)
        self.prefix.begin(sequence)
        if sequence.num_cached is None:
            sequence.num_cached = min(sequence.num_computed, sequence.num_prompt)
            self.num_cached_tokens += sequence.num_cached

    def load_adapter(self, digest: Digest, *, ahead: bool) -> None:
        """Makes an adapter resident that lies in host memory, and idle; its pages can be had. Changes state."""
        num_pages = self.adapters.num_pages_to_load(digest)
        self._leave_adapter_pages(num_pages)
        pages = self._take(num_pages)
        self.adapters.load(digest, pages, stamp=self._stamp, ahead=ahead)
        self._loads[digest] = pages

    def touch(self, sequence: Sequence, shared: tuple[int, ...]) -> None:
        """The adapter of a waiting request and ``shared``, the pages that it matches, count as used now: what nobody
        waits for is given up before them. Changes state."""
        # The end of the chain goes first, as in ``release``.
        for page in reversed(shared):
            self.pool.touch(page, stamp=self._stamp)
        if sequence.adapter is not None:
            self.adapters.touch(sequence.adapter, stamp=self._stamp)

    def touch_adapters(self, digests: Iterable[Digest]) -> None:
        """Those that are idle count as used now. Changes state."""
        for digest in digests:
            self.adapters.touch(digest, stamp=self._stamp)

    def grow(self, sequence: Sequence) -> bool:
        """One more page for a running sequence; False when there is none to be had. Changes state."""
        if self.num_available < 1:
            return False
        sequence.pages.extend(self._take(1))
        return True

    def release(self, sequence: Sequence) -> None:
        """Takes back the pages and the pin of a sequence that is in no step; sealed pages stay findable.

        Changes state.
        """
        assert sequence.num_in_flight == 0, "pages released that a step in flight uses"
        self.prefix.end(sequence)
        # The end of the chain goes first: without its head the rest could not be found.
        self.pool.release(reversed(sequence.pages), stamp=self._stamp)
        sequence.pages = []
        sequence.num_computed = sequence.num_scheduled = 0
        sequence.num_sealed = 0
        if sequence.adapter is not None:
            self.adapters.unpin(sequence.adapter, stamp=self._stamp)

    def _leave_adapter_pages(self, count: int) -> None:
        """Drops idle adapters until ``count`` more pages of adapters stay within their share."""
        while self.adapters.num_resident_pages + count > self.max_adapter_pages:
            idle = self.adapters.oldest_idle()
            assert idle is not None, "pages were promised that adapters in use hold"
            self._drop_idle(idle[0])

    def _drop_idle(self, digest: Digest) -> None:
        self.adapters.drop(digest, stamp=self._stamp)
        if self._loads.pop(digest, None) is None:
            self._drops[digest] = None

    def undo_load(self, digest: Digest) -> None:
        """A load that was instructed failed: the adapter is nowhere any more. Changes state.

        It is idle and nobody waits for it.
        """
        self.adapters.drop(digest, stamp=self._stamp)
        self.adapters.forget(digest)

    def take_instructions(self) -> tuple[tuple[Digest, ...], tuple[AdapterLoad, ...]]:
        """(drops, loads) since the last call. Changes state.

        Pages are given back when no step in flight uses them, so a load waits for no step in flight.
        """
        drops = tuple(self._drops)
        loads = tuple(AdapterLoad(digest=digest, pages=pages) for digest, pages in self._loads.items())
        self._drops.clear()
        self._loads.clear()
        return drops, loads

    def _take(self, count: int) -> tuple[int, ...]:
        while self.pool.num_free < count:
            cached = self.pool.oldest_cached_stamp
            idle = self.adapters.oldest_idle()
            if cached is not None and (idle is None or cached <= idle[1]):
                self.pool.reclaim_oldest()
            else:
                assert idle is not None, "pages were promised that are not there"
                self._drop_idle(idle[0])
        return self.pool.take(count)

    def validate(self, holders: list[Sequence], waiting: list[Sequence]) -> None:
        """Raises AssertionError when a page leaked or a count differs from what the sequences hold.

        ``holders``: all that hold pages.
        """
        references = Counter(page for sequence in holders for page in sequence.pages)
        references.update(self.adapters.pages_in_use())
        self.pool.validate(dict(references))
        self.prefix.validate(holders)
        assert self.adapters.num_resident_pages <= self.max_adapter_pages, "adapters hold more than their share"
        self.adapters.validate(
            dict(Counter(s.adapter for s in holders if s.adapter is not None)),
            dict(Counter(s.adapter for s in waiting if s.adapter is not None)),
        )
