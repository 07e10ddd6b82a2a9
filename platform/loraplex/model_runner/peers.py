"""How a rank exchanges tensors with the others of its group: what decoder and executor ask for, and what a rank alone
answers.

The exchange itself is ``ranks.exchange``. Legend: T tokens, D hidden, B sampled rows, V vocabulary.
"""

from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from loraplex_kernels.gpu.peers import PeerRows


class Peers(Protocol):
    """All ranks of a group call the same methods in the same order, with tensors of the same shapes. On a GPU nothing
    waits but the stream."""

    @property
    def rows(self) -> "PeerRows | None":
        """For sums of few rows by a kernel; None: all sums are ``all_reduce``."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of ``x`` over the shards of the stage, the same bits on each; ``x`` may be overwritten."""

    def gather_logits(self, logits_BV: torch.Tensor, out_BV: torch.Tensor | None = None) -> torch.Tensor:
        """(B, columns of this shard) -> (B, V) on every shard of the stage, in ``out_BV`` where that is given."""

    def receive_hidden(self, out_TD: torch.Tensor) -> None:
        """The residual of the same shard of the stage before."""

    def send_hidden(self, residual_TD: torch.Tensor) -> None:
        """To the same shard of the next stage. Nobody may write to ``residual_TD`` afterwards; does not wait."""

    def send_tokens(self, tokens_B: torch.Tensor) -> None:
        """From the last stage, which drew them, to the same shard of the first: (B,) int32. As ``send_hidden``."""

    def receive_tokens(self, out_B: torch.Tensor) -> None:
        """On the first stage, in the order of the steps."""


class Alone:
    """A group of one rank: it is first and last stage, and holds all columns."""

    @property
    def rows(self) -> None:
        return None

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def gather_logits(self, logits_BV: torch.Tensor, out_BV: torch.Tensor | None = None) -> torch.Tensor:
        return logits_BV if out_BV is None else out_BV.copy_(logits_BV)

    def receive_hidden(self, out_TD: torch.Tensor) -> None:
        raise AssertionError("there is no stage before")

    def send_hidden(self, residual_TD: torch.Tensor) -> None:
        raise AssertionError("there is no next stage")

    def send_tokens(self, tokens_B: torch.Tensor) -> None:
        raise AssertionError("first and last stage are one")

    def receive_tokens(self, out_B: torch.Tensor) -> None:
        raise AssertionError("first and last stage are one")
