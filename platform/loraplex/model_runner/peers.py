"""How a rank exchanges tensors with the others of its group: what the decoder asks for, and the answer of a rank alone.

The exchange itself is ``ranks.exchange``. Legend: T tokens, D hidden, B sampled rows, V vocabulary.
"""

from typing import Protocol

import torch


class Peers(Protocol):
    """All ranks of a group call the same methods in the same order, with tensors of the same shapes."""

    def all_reduce_(self, x: torch.Tensor) -> None:
        """Sums ``x`` over the shards of the stage, in place: every one gets the same bits."""

    def gather_logits(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """(B, columns of this shard) -> (B, V) on every shard of the stage."""

    def receive_hidden(self, num_tokens: int) -> torch.Tensor:
        """(T, D) residual of the same shard of the stage before."""

    def send_hidden(self, residual_TD: torch.Tensor) -> None:
        """To the same shard of the next stage. Nobody may write to ``residual_TD`` afterwards; does not wait."""


class Alone:
    """A group of one rank: it is first and last stage, and holds all columns."""

    def all_reduce_(self, x: torch.Tensor) -> None:
        pass

    def gather_logits(self, logits_BV: torch.Tensor) -> torch.Tensor:
        return logits_BV

    def receive_hidden(self, num_tokens: int) -> torch.Tensor:
        raise AssertionError("there is no stage before")

    def send_hidden(self, residual_TD: torch.Tensor) -> None:
        raise AssertionError("there is no next stage")
