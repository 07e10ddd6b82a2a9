"""The device tier of adapters for the Triton kernels: copies of staged blobs in arena pages, and a table of records.

Owns digest -> records and the stream that copies. Pages come from the engine, which gives none that a step in flight
uses, so a copy waits for nothing; bytes come from ``host_adapters``. A step waits, layer by layer where it runs
eagerly, only for the copies that it names. Called by the executor, between steps.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import torch
from loraplex_kernels.gpu.lora import LoraTable, Site

from loraplex.core.errors import Conflict, Overloaded
from loraplex.core.ids import Digest
from loraplex.core.model import LORA_MODULES, ModelSpec
from loraplex.model_runner.adapter_layout import SITES, AdapterLayout
from loraplex.model_runner.arena import Arena
from loraplex.model_runner.gpu.records import RecordPlan, plan_records
from loraplex.model_runner.host_adapters import StagedAdapter

_COPY_SEGMENTS = 4
"""Parts of an adapter whose arrival is told apart: its first layers run while the last are on their way."""

_MAX_CACHED_PLANS = 1024


@dataclass(frozen=True, slots=True)
class Arrival:
    """Layers from ``first_layer`` on must not read the adapter before ``event`` has passed."""

    first_layer: int
    event: torch.cuda.Event

    @property
    def done(self) -> bool:
        return bool(self.event.query())  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidentAdapter:
    record: int
    num_planes: int
    max_rank: int
    sites: frozenset[Site]


@dataclass(slots=True)
class _Resident:
    adapter: ResidentAdapter
    arrivals: list[Arrival] = field(default_factory=list)
    """Copies that were not done when last asked, first layers first."""


class GpuAdapters:
    def __init__(self, model: ModelSpec, arena: Arena, *, num_records: int) -> None:
        """``num_records``: planes that can be resident at the same time (an adapter up to rank 64 takes one)."""
        device = arena.pages.device
        self._model = model
        self._arena = arena
        self._entries_per_record = model.num_layers * len(LORA_MODULES)
        self.table = LoraTable(
            arena=arena.elements,
            entries=torch.zeros((num_records, self._entries_per_record, 2), dtype=torch.int64, device=device),
        )
        self._resident: dict[Digest, _Resident] = {}
        self._free = np.ones(num_records, dtype=np.bool_)
        self._plans: dict[int, tuple[AdapterLayout, RecordPlan]] = {}
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def check(self, layout: AdapterLayout) -> None:
        """Raises BadConfig when pages are so small that a block is cut between multiples of 8 ranks. Any thread."""
        self._plan(layout)

    def load(self, digest: Digest, staged: StagedAdapter, pages: Sequence[int]) -> None:
        """Starts the copy of the blob into ``pages``. Conflict when already loaded or when the number of pages is
        wrong, Overloaded when no record is free. After an exception nothing is written to ``pages`` any more."""
        if digest in self._resident:
            raise Conflict(f"adapter {digest} is already loaded")
        if len(pages) != staged.layout.num_pages:
            raise Conflict(f"adapter {digest} takes {staged.layout.num_pages} pages, {len(pages)} were given")
        plan = self._plan(staged.layout)
        record = self._take_records(plan.num_planes)
        try:
            self._resident[digest] = self._start_copy(staged, pages, plan, record)
        except BaseException:
            # An error of the device is on its way to the caller, and nothing runs after it.
            with suppress(RuntimeError):
                if self._stream is not None:
                    self._stream.synchronize()
            self._free[record : record + plan.num_planes] = True
            raise

    def _start_copy(self, staged: StagedAdapter, pages: Sequence[int], plan: RecordPlan, record: int) -> _Resident:
        entries = torch.from_numpy(
            plan.entries(
                tuple(pages),
                page_elements=self._arena.kv.layout.elements_per_page,
                entries_per_record=self._entries_per_record,
            )
        )
        # On the stream of the steps: an earlier step may still read what these records held.
        target = self.table.entries[record : record + plan.num_planes]
        target.copy_(entries.pin_memory() if self._stream is not None else entries, non_blocking=True)
        resident = _Resident(
            ResidentAdapter(record=record, num_planes=plan.num_planes, max_rank=plan.max_rank, sites=plan.sites)
        )
        if self._stream is None:
            self._copy(staged.blob, pages, 0, len(pages))
        else:
            with torch.cuda.stream(self._stream):
                for first, last, first_layer in _segments(staged.layout, self._model.num_layers):
                    self._copy(staged.blob, pages, first, last)
                    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                    event.record(self._stream)
                    resident.arrivals.append(Arrival(first_layer, event))
            staged.run.copied_when(resident.arrivals[-1].event)
        return resident

    def drop(self, digest: Digest) -> None:
        """Idempotent; no step in flight names it. What is queued from now on may overwrite the pages: it waits for a
        copy still under way."""
        resident = self._resident.pop(digest, None)
        if resident is None:
            return
        for arrival in resident.arrivals:
            torch.cuda.current_stream(self._arena.pages.device).wait_event(arrival.event)
        adapter = resident.adapter
        self._free[adapter.record : adapter.record + adapter.num_planes] = True

    def get(self, digest: Digest) -> ResidentAdapter:
        """Conflict when not loaded."""
        resident = self._resident.get(digest)
        if resident is None:
            raise Conflict(f"adapter {digest} is not loaded")
        return resident.adapter

    def arrivals(self, digests: Iterable[Digest]) -> list[Arrival]:
        """What a step that names ``digests`` must wait for: the copies that are not known to be done. A step that was
        given them may fail before it waits, so the next one gets them too."""
        found: list[Arrival] = []
        for digest in digests:
            resident = self._resident[digest]
            if resident.arrivals:
                resident.arrivals = [arrival for arrival in resident.arrivals if not arrival.done]
                found += resident.arrivals
        return found

    def _plan(self, layout: AdapterLayout) -> RecordPlan:
        # By identity: adapters of one shape share one layout, and hashing hundreds of parts costs a millisecond.
        known = self._plans.get(id(layout))
        if known is None:
            if len(self._plans) >= _MAX_CACHED_PLANS:
                self._plans.clear()
            known = (layout, plan_records(layout, self._model, itemsize=self._arena.dtype.itemsize))
            self._plans[id(layout)] = known
        return known[1]

    def _take_records(self, count: int) -> int:
        free = self._free
        if count == 1:
            first = int(free.argmax())
        else:
            windows = np.lib.stride_tricks.sliding_window_view(free, count).all(axis=1)
            first = int(windows.argmax())
        if not free[first : first + count].all():
            raise Overloaded("the table of resident adapters is full")
        free[first : first + count] = False
        return first

    def _copy(self, blob: torch.Tensor, pages: Sequence[int], first: int, last: int) -> None:
        for start, length in _runs(pages, first, last):
            page = pages[start]
            self._arena.pages[page : page + length].copy_(blob[start : start + length], non_blocking=True)


def _segments(layout: AdapterLayout, num_layers: int) -> Iterator[tuple[int, int, int]]:
    """(first page, end page, first layer that needs them): copies in page order, cut after whole layers."""
    last_page = np.zeros(num_layers, dtype=np.int64)
    for part in layout.parts:
        layer = part.site // len(SITES)
        last_page[layer] = max(last_page[layer], part.page)
    ends = np.maximum.accumulate(last_page) + 1
    start = first_layer = 0
    for segment in range(1, _COPY_SEGMENTS + 1):
        layers = num_layers * segment // _COPY_SEGMENTS
        end = layout.num_pages if segment == _COPY_SEGMENTS else int(ends[layers - 1]) if layers else 0
        if end > start:
            yield start, end, first_layer
            start, first_layer = end, layers


def _runs(pages: Sequence[int], first: int, last: int) -> Iterator[tuple[int, int]]:
    """(index, length) of each run of consecutive page ids in [first, last): one copy each."""
    start = first
    for index in range(first + 1, last + 1):
        if index == last or pages[index] != pages[index - 1] + 1:
            yield start, index - start
            start = index
