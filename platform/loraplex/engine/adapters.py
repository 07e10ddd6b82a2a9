"""Owns where each adapter is: missing, being staged, in host memory, or resident in pages; and who uses it.

Residency is counted in pages, never in slots. A resident adapter that no running request uses is idle: it stays until
its pages are needed. Which idle one goes first: reload cost x probability of reuse per byte; the reload cost is
proportional to the bytes, so what remains is the probability of reuse, estimated by recency (LRU).
Called by ``memory`` and ``engine``; knows nothing of KV.
"""

from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum

from loraplex.core.ids import Digest
from loraplex.engine.pages import PagePool


class AdapterState(Enum):
    MISSING = "missing"
    STAGING = "staging"
    HOST = "host"
    RESIDENT = "resident"


@dataclass(slots=True)
class _Entry:
    state: AdapterState = AdapterState.MISSING
    num_pages: int = 0
    pages: tuple[int, ...] = ()
    num_users: int = 0
    num_waiters: int = 0
    loaded_ahead: bool = False
    """Made resident before the turn of any waiting request, and not used since. Once only while somebody waits: who
    lost its pages again gets them at its admission."""


class AdapterResidency:
    def __init__(self, pool: PagePool, *, max_host_pages: int) -> None:
        self._pool = pool
        self._max_host_pages = max_host_pages
        self._entries: dict[Digest, _Entry] = {}
        self._missing: dict[Digest, None] = {}
        self._idle: OrderedDict[Digest, int] = OrderedDict()
        self._num_idle_pages = 0
        self._num_resident_pages = 0
        self._num_ahead_pages = 0
        self._loadable: dict[Digest, None] = {}
        self._host: OrderedDict[Digest, None] = OrderedDict()
        self._num_host_pages = 0
        self.version = 0
        """Grows whenever the set of resident adapters changes."""
        self.num_loads = 0
        """Copies that an admitted request waits for."""
        self.num_prefetches = 0
        """Copies begun before the turn of the request that they are for."""

    @property
    def num_idle_pages(self) -> int:
        return self._num_idle_pages

    @property
    def num_resident_pages(self) -> int:
        """Idle ones and those in use."""
        return self._num_resident_pages

    @property
    def num_ahead_pages(self) -> int:
        """Of adapters that were loaded ahead, and are neither used yet nor dropped."""
        return self._num_ahead_pages

    @property
    def any_loadable(self) -> bool:
        return bool(self._loadable)

    def is_loadable(self, digest: Digest) -> bool:
        """True when a waiting request needs it, it lies in host memory, and it may be loaded ahead."""
        return digest in self._loadable

    def state(self, digest: Digest) -> AdapterState:
        entry = self._entries.get(digest)
        return AdapterState.MISSING if entry is None else entry.state

    def is_ready(self, digest: Digest) -> bool:
        """True when it can be used in the next step: in host memory or resident."""
        return self.state(digest) in (AdapterState.HOST, AdapterState.RESIDENT)

    def num_users(self, digest: Digest) -> int:
        """Running requests of it."""
        entry = self._entries.get(digest)
        return 0 if entry is None else entry.num_users

    def num_pages(self, digest: Digest) -> int:
        """Pages it takes when resident; 0 while it was never staged."""
        entry = self._entries.get(digest)
        return 0 if entry is None else entry.num_pages

    def num_pages_to_load(self, digest: Digest) -> int:
        return 0 if self.state(digest) is AdapterState.RESIDENT else self.num_pages(digest)

    def idle_pages_of(self, digest: Digest) -> int:
        return self._entries[digest].num_pages if digest in self._idle else 0

    def resident(self) -> tuple[Digest, ...]:
        return tuple(d for d, e in self._entries.items() if e.state is AdapterState.RESIDENT)

    def add_waiter(self, digest: Digest) -> None:
        """A request of it waits: it is wanted, and stays in host memory. Changes state."""
        entry = self._entries.setdefault(digest, _Entry())
        entry.num_waiters += 1
        if entry.state is AdapterState.MISSING:
            self._missing[digest] = None
        self._note_loadable(digest, entry)

    def remove_waiter(self, digest: Digest) -> None:
        """Changes state."""
        entry = self._entries[digest]
        entry.num_waiters -= 1
        assert entry.num_waiters >= 0, "more waiters left than came"
        if entry.num_waiters == 0:
            self._end_ahead(entry)
        self._note_loadable(digest, entry)
        if entry.state is AdapterState.MISSING and entry.num_waiters == 0:
            self._missing.pop(digest, None)
            del self._entries[digest]

    def take_missing(self) -> tuple[Digest, ...]:
        """Adapters to stage, each once; they are in staging from now on. Changes state."""
        wanted = tuple(self._missing)
        self._missing.clear()
        for digest in wanted:
            self._entries[digest].state = AdapterState.STAGING
        return wanted

    def staged(self, digest: Digest, num_pages: int) -> None:
        """It lies in host memory now. Also accepted unasked and twice. Changes state."""
        entry = self._entries.setdefault(digest, _Entry())
        if entry.state in (AdapterState.HOST, AdapterState.RESIDENT):
            return
        self._missing.pop(digest, None)
        entry.state = AdapterState.HOST
        entry.num_pages = num_pages
        self._host[digest] = None
        self._num_host_pages += num_pages
        self._note_loadable(digest, entry)

    def failed(self, digest: Digest) -> None:
        """Staging failed. Its requests have been taken out before; a later one tries again. Changes state."""
        entry = self._entries.get(digest)
        if entry is not None and entry.state in (AdapterState.MISSING, AdapterState.STAGING):
            assert entry.num_waiters == 0, "an adapter failed while requests wait for it"
            self._missing.pop(digest, None)
            del self._entries[digest]

    def load(self, digest: Digest, pages: tuple[int, ...], *, stamp: int, ahead: bool) -> None:
        """It becomes resident in ``pages`` (taken from the pool by the caller) and idle. ``ahead``: before the turn of
        whoever waits for it, or before anybody does. Changes state."""
        entry = self._entries[digest]
        assert entry.state is AdapterState.HOST, f"adapter {digest} loaded from {entry.state}"
        assert len(pages) == entry.num_pages, "an adapter got the wrong number of pages"
        entry.state, entry.pages = AdapterState.RESIDENT, pages
        self._idle[digest] = stamp
        self._num_idle_pages += entry.num_pages
        self._num_resident_pages += entry.num_pages
        self.version += 1
        entry.loaded_ahead = ahead and entry.num_waiters > 0
        if entry.loaded_ahead:
            self._num_ahead_pages += entry.num_pages
        if ahead:
            self.num_prefetches += 1
        else:
            self.num_loads += 1
        self._note_loadable(digest, entry)

    def touch(self, digest: Digest, *, stamp: int) -> None:
        """If it is idle it counts as used now. Changes state."""
        if digest in self._idle:
            self._idle[digest] = stamp
            self._idle.move_to_end(digest)

    def pin(self, digest: Digest) -> None:
        """One more running request uses a resident adapter. Changes state."""
        entry = self._entries[digest]
        assert entry.state is AdapterState.RESIDENT, f"adapter {digest} used while {entry.state}"
        entry.num_users += 1
        self._end_ahead(entry)
        if self._idle.pop(digest, None) is not None:
            self._num_idle_pages -= entry.num_pages
        self._host.move_to_end(digest)

    def unpin(self, digest: Digest, *, stamp: int) -> None:
        """Changes state."""
        entry = self._entries[digest]
        entry.num_users -= 1
        assert entry.num_users >= 0, "an adapter was unpinned too often"
        if entry.num_users == 0:
            self._idle[digest] = stamp
            self._num_idle_pages += entry.num_pages

    def oldest_idle(self) -> tuple[Digest, int] | None:
        """(digest, stamp) of the idle adapter that goes first."""
        return next(iter(self._idle.items()), None)

    def drop(self, digest: Digest, *, stamp: int) -> None:
        """Takes the pages of an idle adapter; it stays in host memory. Changes state."""
        entry = self._entries[digest]
        del self._idle[digest]
        self._num_idle_pages -= entry.num_pages
        self._num_resident_pages -= entry.num_pages
        self._pool.release(entry.pages, stamp=stamp)
        if entry.loaded_ahead:
            self._num_ahead_pages -= entry.num_pages
        entry.state, entry.pages = AdapterState.HOST, ()
        self.version += 1
        self._note_loadable(digest, entry)

    def trim_host(self) -> tuple[Digest, ...]:
        """Adapters to drop from host memory so that it holds ``max_host_pages`` at most. Changes state.

        Resident and awaited ones stay, so the limit can be passed by as much as they take.
        """
        if self._num_host_pages <= self._max_host_pages:
            return ()
        dropped: list[Digest] = []
        for digest in tuple(self._host):
            entry = self._entries[digest]
            if entry.state is AdapterState.HOST and entry.num_waiters == 0:
                self.forget(digest)
                dropped.append(digest)
                if self._num_host_pages <= self._max_host_pages:
                    break
        return tuple(dropped)

    def forget(self, digest: Digest) -> None:
        """Host memory no longer holds it; it is not resident and nobody waits for it. Changes state."""
        entry = self._entries.pop(digest)
        assert entry.state is AdapterState.HOST, f"adapter {digest} forgotten while {entry.state}"
        assert entry.num_waiters == 0, "an awaited adapter was forgotten"
        del self._host[digest]
        self._num_host_pages -= entry.num_pages

    def _end_ahead(self, entry: _Entry) -> None:
        """It is used, or nobody waits for it any more."""
        if entry.loaded_ahead and entry.state is AdapterState.RESIDENT:
            self._num_ahead_pages -= entry.num_pages
        entry.loaded_ahead = False

    def _note_loadable(self, digest: Digest, entry: _Entry) -> None:
        if entry.state is AdapterState.HOST and entry.num_waiters > 0 and not entry.loaded_ahead:
            self._loadable[digest] = None
        else:
            self._loadable.pop(digest, None)

    def pages_in_use(self) -> tuple[int, ...]:
        """All pages that hold adapters."""
        return tuple(page for entry in self._entries.values() for page in entry.pages)

    def validate(self, users: dict[Digest, int], waiters: dict[Digest, int]) -> None:
        """Raises AssertionError unless the counts of running and waiting requests per adapter are exactly these."""
        entries = self._entries
        assert {d: e.num_users for d, e in entries.items() if e.num_users} == users, "users differ"
        assert {d: e.num_waiters for d, e in entries.items() if e.num_waiters} == waiters, "waiters differ"
        for digest, entry in entries.items():
            resident = entry.state is AdapterState.RESIDENT
            assert len(entry.pages) == (entry.num_pages if resident else 0)
            assert (digest in self._idle) == (resident and entry.num_users == 0)
            assert (digest in self._host) == (entry.state in (AdapterState.HOST, AdapterState.RESIDENT))
            assert (digest in self._missing) == (entry.state is AdapterState.MISSING)
            assert (digest in self._loadable) == (
                entry.state is AdapterState.HOST and entry.num_waiters > 0 and not entry.loaded_ahead
            )
            assert not entry.loaded_ahead or (entry.num_users == 0 and entry.num_waiters > 0)
        assert set(self._loadable) <= set(entries)
        assert self._num_ahead_pages == sum(len(entry.pages) for entry in entries.values() if entry.loaded_ahead)
        assert self._num_idle_pages == sum(entries[d].num_pages for d in self._idle)
        assert self._num_resident_pages == sum(len(entry.pages) for entry in entries.values())
        assert self._num_host_pages == sum(entries[d].num_pages for d in self._host)
