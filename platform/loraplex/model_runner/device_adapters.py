"""The resident tier of adapters on the CPU: copies of staged blobs in arena pages, and the views that operations read.

Owns the map digest -> addresses. Pages come from the engine; bytes from ``host_adapters``. Called by the executor,
between steps.
"""

from collections.abc import Sequence

import torch
from loraplex_kernels import ExpandPart, LoraSite

from loraplex.core.errors import Conflict
from loraplex.core.ids import Digest
from loraplex.core.model import ModelSpec
from loraplex.model_runner.adapter_layout import SITES, AdapterLayout, AdapterPart
from loraplex.model_runner.arena import Arena
from loraplex.model_runner.host_adapters import StagedAdapter


class DeviceAdapters:
    def __init__(self, model: ModelSpec, arena: Arena) -> None:
        self._num_sites = model.num_layers * len(SITES)
        self._output_sizes = [tuple(model.projection_shape(module)[1] for module in modules) for modules in SITES]
        self._arena = arena
        self._resident: dict[Digest, tuple[LoraSite | None, ...]] = {}

    def load(self, digest: Digest, staged: StagedAdapter, pages: Sequence[int]) -> None:
        """Copies the blob into ``pages``. Conflict when already loaded, or when the number of pages is wrong."""
        if digest in self._resident:
            raise Conflict(f"adapter {digest} is already loaded")
        if len(pages) != staged.layout.num_pages:
            raise Conflict(f"adapter {digest} takes {staged.layout.num_pages} pages, {len(pages)} were given")
        for index, page in enumerate(pages):
            self._arena.pages[page].copy_(staged.blob[index])
        self._resident[digest] = self._views(staged.layout, pages)

    def drop(self, digest: Digest) -> None:
        """Idempotent."""
        self._resident.pop(digest, None)

    def sites(self, digest: Digest) -> Sequence[LoraSite | None]:
        """By site number. Conflict when not loaded."""
        sites = self._resident.get(digest)
        if sites is None:
            raise Conflict(f"adapter {digest} is not loaded")
        return sites

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
