"""Host memory for staged adapters: slabs, pinned once where an accelerator copies from them, cut into runs of pages.

Pinning costs tens of milliseconds for an adapter's bytes and torch's pinned allocator rounds up to a power of two, so
slabs are registered when the pool grows and stay until ``close``; a run is a first fit among their free pages. A run
that is given back while somebody reads it, or while a copy on the device does, is free when they are done. How much is
staged is the engine's policy: the pool grows to what is asked for. Called by ``host_adapters``, from any thread.
"""

import mmap
import threading
import weakref
from bisect import insort
from typing import Any, Protocol

import torch

_SLAB_BYTES = 1 << 28
"""The first adapter in a slab waits until it is pinned: 1 GiB took 1.1 s on an H100 machine."""


class CopyEvent(Protocol):
    """A ``torch.cuda.Event`` that was recorded behind a copy."""

    def query(self) -> bool:
        """True when the copy is done."""

    def synchronize(self) -> None: ...


class HostRun:
    """Contiguous pages of a slab. Made by ``HostPool.take``; its bytes are whatever was there before."""

    __slots__ = ("_copies", "_first", "_num_readers", "_returned", "_slab", "pages")

    def __init__(self, slab: "_Slab", first: int, num_pages: int) -> None:
        self.pages: torch.Tensor = slab.pages[first : first + num_pages]
        """(num_pages, page_bytes) uint8."""
        self._slab = slab
        self._first = first
        self._copies: list[CopyEvent] = []
        self._num_readers = 0
        self._returned = False

    def copied_when(self, event: CopyEvent) -> None:
        """The device reads it until ``event`` has passed. Called while the run is held."""
        self._copies = [*(copy for copy in self._copies if not copy.query()), event]

    @property
    def _is_free(self) -> bool:
        return self._returned and self._num_readers == 0 and all(copy.query() for copy in self._copies)


class HostPool:
    def __init__(self, *, page_bytes: int, pin: bool, slab_bytes: int = _SLAB_BYTES) -> None:
        """Allocates nothing yet. A run that is larger than a slab of ``slab_bytes`` gets one of its own size."""
        self._page_bytes = page_bytes
        self._pin = pin
        self._slab_pages = max(1, slab_bytes // page_bytes)
        self._lock = threading.Lock()
        self._growing = threading.Lock()
        self._slabs: list[_Slab] = []
        self._leaving: list[HostRun] = []
        self._num_taken = 0

    @property
    def num_bytes(self) -> int:
        """Of all slabs."""
        with self._lock:
            return sum(slab.num_pages for slab in self._slabs) * self._page_bytes

    def take(self, num_pages: int) -> HostRun:
        """Grows when no free run is long enough, which takes a while; other threads go on meanwhile."""
        run = self._fit(num_pages)
        if run is not None:
            return run
        with self._growing:
            run = self._fit(num_pages)
            while run is None:
                slab = _Slab(max(num_pages, self._slab_pages), self._page_bytes, pin=self._pin)
                with self._lock:
                    self._slabs.append(slab)
                run = self._fit(num_pages)
        return run

    def give_back(self, run: HostRun) -> None:
        """Once for each run; its pages are free as soon as nobody reads them."""
        with self._lock:
            assert not run._returned, "a run of host pages was given back twice"
            run._returned = True
            self._leaving.append(run)
            self._sweep()

    def hold(self, run: HostRun) -> None:
        """Its bytes stay until ``let_go``, also when it is given back meanwhile."""
        with self._lock:
            assert not run._returned, "a run of host pages is read after it was given back"
            run._num_readers += 1

    def let_go(self, run: HostRun) -> None:
        with self._lock:
            run._num_readers -= 1

    def close(self) -> None:
        """Waits for the copies that read from it, and unpins. Nothing is taken from it afterwards. Idempotent."""
        with self._lock:
            for run in self._leaving:
                for copy in run._copies:
                    copy.synchronize()
            for slab in self._slabs:
                slab.close()
            self._slabs.clear()
            self._leaving.clear()

    def validate(self) -> None:
        """Raises AssertionError when a page leaked or is free twice."""
        with self._lock:
            num_free = 0
            for slab in self._slabs:
                end = 0
                for first, count in slab.free:
                    assert count > 0, "an empty run is free"
                    assert first > end or (first == end == 0), "free runs overlap, or touch and were not joined"
                    end = first + count
                    num_free += count
                assert end <= slab.num_pages, "a free run lies outside its slab"
            assert num_free + self._num_taken == sum(slab.num_pages for slab in self._slabs), "host pages leaked"

    def _fit(self, num_pages: int) -> HostRun | None:
        with self._lock:
            self._sweep()
            for slab in self._slabs:
                first = slab.take(num_pages)
                if first is not None:
                    self._num_taken += num_pages
                    return HostRun(slab, first, num_pages)
        return None

    def _sweep(self) -> None:
        leaving = self._leaving
        self._leaving = [run for run in leaving if not run._is_free]
        for run in leaving:
            if run not in self._leaving:
                run._slab.give_back(run._first, len(run.pages))
                self._num_taken -= len(run.pages)


class _Slab:
    """Page-aligned memory of its own, with its free runs."""

    def __init__(self, num_pages: int, page_bytes: int, *, pin: bool) -> None:
        self.num_pages = num_pages
        self.free = [(0, num_pages)]
        """(first, count) by first; neighbours are joined."""
        memory = mmap.mmap(-1, num_pages * page_bytes)
        # Fewer page faults, and fewer pages to pin.
        memory.madvise(mmap.MADV_HUGEPAGE)
        flat = torch.frombuffer(memory, dtype=torch.uint8)
        self.pages = flat.view(num_pages, page_bytes)
        self._unpin: weakref.finalize[..., mmap.mmap] | None = None
        if pin:
            address = flat.data_ptr()
            _check(_cudart().cudaHostRegister(address, flat.numel(), 0))
            # At the latest when the memory goes: what comes to the same place could not be pinned otherwise.
            self._unpin = weakref.finalize(memory, _unregister, address)
            self._unpin.atexit = False

    def take(self, count: int) -> int | None:
        for index, (first, length) in enumerate(self.free):
            if length >= count:
                self.free[index : index + 1] = [(first + count, length - count)] if length > count else []
                return first
        return None

    def give_back(self, first: int, count: int) -> None:
        insort(self.free, (first, count))
        index = self.free.index((first, count))
        if index + 1 < len(self.free) and self.free[index + 1][0] == first + count:
            count += self.free.pop(index + 1)[1]
        if index > 0 and sum(self.free[index - 1]) == first:
            first, before = self.free[index - 1]
            self.free.pop(index)
            index, count = index - 1, before + count
        self.free[index] = (first, count)

    def close(self) -> None:
        if self._unpin is not None:
            self._unpin()


def _unregister(address: int) -> None:
    _check(_cudart().cudaHostUnregister(address))


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _check(result: int) -> None:
    """Raises torch's CudaError."""
    torch.cuda.check_error(int(result))
