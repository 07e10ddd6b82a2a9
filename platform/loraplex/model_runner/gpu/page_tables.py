"""The page table of every slot on the device, kept up to date by what a step adds.

A slot's table only grows between its start and its release, so a step uploads the new entries alone. Called by the
executor. Legend: S slots, P pages of a slot at most, U updates.
"""

from collections.abc import Sequence

import numpy as np
import torch
from loraplex_kernels.gpu.page_table import write_page_table

from loraplex.core.step import Row
from loraplex.model_runner.gpu.upload import upload


class PageTables:
    def __init__(self, num_slots: int, max_pages: int, device: torch.device) -> None:
        self.table = torch.zeros((num_slots, max_pages), dtype=torch.int32, device=device)
        """(S, P) int32 page ids."""
        self._max_pages = max_pages
        self._known = [0] * num_slots

    def start(self, slot: int) -> None:
        """The slot belongs to another request from now on."""
        self._known[slot] = 0

    def update(self, rows: Sequence[Row]) -> None:
        """Enqueues the entries that the device does not have yet."""
        index: list[int] = []
        pages: list[int] = []
        known = self._known
        for row in rows:
            count, slot = len(row.pages), row.slot
            first = known[slot]
            if count > first:
                base = slot * self._max_pages
                index.extend(range(base + first, base + count))
                pages.extend(row.pages[first:])
                known[slot] = count
        if index:
            updates = np.array([index, pages], dtype=np.int32)
            write_page_table(self.table, upload(updates, self.table.device))
