"""The device tier of adapters: copies of staged blobs in arena pages, and the views through which kernels read them.

Owns the map digest -> addresses. Pages come from the engine; bytes from ``host_adapters``. On an accelerator copies run
on a stream of their own and a step waits for those that it names. Called by the executor, between steps.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from loraplex_kernels import ExpandPart, LoraSite

from loraplex.core.errors import Conflict
from loraplex.core.ids import Digest
from loraplex.core.model import ModelSpec
from loraplex.model_runner.adapter_layout import SITES, AdapterLayout, AdapterPart
from loraplex.model_runner.arena import Arena
from loraplex.model_runner.host_adapters import StagedAdapter


@dataclass(slots=True)
class _Resident:
    sites: tuple[LoraSite | None, ...]
    copied: torch.cuda.Event | None
    """Still to be waited for by the first step that names the adapter; None once a step has waited."""


class DeviceAdapters:
    def __init__(self, model: ModelSpec, arena: Arena) -> None:
        self._num_sites = model.num_layers * len(SITES)
        self._output_sizes = [tuple(model.projection_shape(module)[1] for module in modules) for modules in SITES]
        self._arena = arena
        self._resident: dict[Digest, _Resident] = {}
        device = arena.pages.device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def load(self, digest: Digest, staged: StagedAdapter, pages: Sequence[int]) -> None:
        """Copies the blob into ``pages``. Conflict when already loaded, or when the number of pages is wrong."""
        if digest in self._resident:
            raise Conflict(f"adapter {digest} is already loaded")
        if len(pages) != staged.layout.num_pages:
            raise Conflict(f"adapter {digest} takes {staged.layout.num_pages} pages, {len(pages)} were given")
        copied: torch.cuda.Event | None = None
        if self._stream is None:
            self._copy(staged.blob, pages)
        else:
            # Earlier steps may still read what the pages held before.
            self._stream.wait_stream(torch.cuda.current_stream(self._arena.pages.device))
            with torch.cuda.stream(self._stream):
                self._copy(staged.blob, pages)
                copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
                copied.record(self._stream)
        self._resident[digest] = _Resident(sites=self._views(staged.layout, pages), copied=copied)

    def drop(self, digest: Digest) -> None:
        """Idempotent. What is queued from now on may overwrite the pages: it waits for a copy still under way."""
        resident = self._resident.pop(digest, None)
        if resident is not None and resident.copied is not None:
            torch.cuda.current_stream(self._arena.pages.device).wait_event(resident.copied)

    def sites(self, digest: Digest) -> Sequence[LoraSite | None]:
        """By site number; work queued from now on sees the copied bytes. Conflict when not loaded."""
        resident = self._resident.get(digest)
        if resident is None:
            raise Conflict(f"adapter {digest} is not loaded")
        if resident.copied is not None:
            torch.cuda.current_stream(self._arena.pages.device).wait_event(resident.copied)
            resident.copied = None
        return resident.sites

    def _copy(self, blob: torch.Tensor, pages: Sequence[int]) -> None:
        for start, length in _runs(pages):
            first = pages[start]
            self._arena.pages[first : first + length].copy_(blob[start : start + length], non_blocking=True)

    def _views(self, layout: AdapterLayout, pages: Sequence[int]) -> tuple[LoraSite | None, ...]:
        shrink: dict[int, list[torch.Tensor]] = {}
        expand: dict[int, list[ExpandPart]] = {}
        for part in layout.parts:
            matrix = self._matrix(part, pages)
            if part.placed is None:
                shrink.setdefault(part.site, []).append(matrix.t())
            else:
                output = SITES[part.site % len(SITES)].index(part.placed.block.module)
                expand.setdefault(part.site, []).append(ExpandPart(output=output, weight=matrix))
        return tuple(
            LoraSite(
                shrink=tuple(shrink[site]),
                expand=tuple(expand[site]),
                expand_ranks=tuple(part.weight.shape[0] for part in expand[site]),
                output_sizes=self._output_sizes[site % len(SITES)],
            )
            if site in shrink
            else None
            for site in range(self._num_sites)
        )

    def _matrix(self, part: AdapterPart, pages: Sequence[int]) -> torch.Tensor:
        return self._arena.matrix(
            pages[part.page], part.offset_bytes, part.rank_end - part.rank_start, part.num_columns
        )


def _runs(pages: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(index, length) of each run of consecutive page ids: one copy each."""
    start = 0
    for index in range(1, len(pages) + 1):
        if index == len(pages) or pages[index] != pages[index - 1] + 1:
            yield start, index - start
            start = index
