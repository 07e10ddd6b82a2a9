"""Repetition, frequency and presence penalties, and the record of seen tokens that they need; all on the device.

Owned by ``sampler``. Nothing here waits for the device.
Shape legend: R rows of a group, V vocabulary, P table rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


class TokenTable:
    """Which tokens each penalised request has seen: one row of two vocabulary-wide tensors per request."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self.counts_PV = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)
        """How often each token was generated."""
        self.prompt_PV = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)
        self._row_of: dict[int, int] = {}
        self._free: list[int] = []

    def rows(self, slots: Sequence[int]) -> list[int]:
        return [self._row_of[slot] for slot in slots]

    def start(self, slot: int, prompt: torch.Tensor, output: torch.Tensor) -> None:
        """Token ids, int64 on the device."""
        if not self._free:
            self._grow()
        row = self._row_of[slot] = self._free.pop()
        counts_V, prompt_V = self.counts_PV[row], self.prompt_PV[row]
        counts_V.zero_()
        counts_V.index_add_(0, output, torch.ones_like(output, dtype=torch.int32))
        prompt_V.zero_()
        prompt_V.index_fill_(0, prompt, True)

    def release(self, slot: int) -> None:
        row = self._row_of.pop(slot, None)
        if row is not None:
            self._free.append(row)

    def add(self, rows_R: torch.Tensor, tokens_R: torch.Tensor) -> None:
        self.counts_PV[rows_R, tokens_R] += 1

    def _grow(self) -> None:
        old = self.counts_PV.shape[0]
        extra = max(4, old)
        counts_PV = torch.zeros((extra, self._vocab_size), dtype=torch.int32, device=self._device)
        prompt_PV = torch.zeros((extra, self._vocab_size), dtype=torch.bool, device=self._device)
        self.counts_PV = torch.cat([self.counts_PV, counts_PV])
        self.prompt_PV = torch.cat([self.prompt_PV, prompt_PV])
        self._free.extend(reversed(range(old, old + extra)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Penalties:
    """Of the penalised rows of a batch."""

    rows: torch.Tensor
    """(R,) int64, in the batch."""
    table_rows: torch.Tensor
    """(R,) int64"""
    repetition: torch.Tensor
    """(R, 1) fp32, as the two below."""
    frequency: torch.Tensor
    presence: torch.Tensor


def penalise(logits_RV: torch.Tensor, penalties: Penalties, table: TokenTable) -> torch.Tensor:
    counts_RV = table.counts_PV[penalties.table_rows]
    output_RV = counts_RV > 0
    seen_RV = table.prompt_PV[penalties.table_rows] | output_RV
    repetition_R1 = penalties.repetition
    scaled_RV = torch.where(logits_RV > 0, logits_RV / repetition_R1, logits_RV * repetition_R1)
    logits_RV = torch.where(seen_RV, scaled_RV, logits_RV)
    return logits_RV - penalties.frequency * counts_RV - penalties.presence * output_RV
