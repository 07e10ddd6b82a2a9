"""What one draw of the sampler yields: tokens on the device at once, on the host when somebody asks.

The copies to the host are queued behind the draw, and an event after them, so that ``result`` waits for its own step
and for nothing that was submitted later. Device and pinned memory come from torch's caching allocators, which hand a
block out again only after the work queued on it.

Shape legend: B rows of the step, R rows that asked for log-probabilities, K most likely tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loraplex.core.request import TokenLogprob
from loraplex.core.step import SampledToken


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnLogprobs:
    """Log-probabilities of the rows that asked for them, on the device."""

    rows: Sequence[int]
    """Their places in the step, ascending."""
    num_top: Sequence[int]
    """How many of the K entries each row asked for."""
    chosen: torch.Tensor
    """(R,)"""
    top_ids: torch.Tensor
    """(R, K)"""
    top_values: torch.Tensor
    """(R, K), falling."""


class Drawn:
    """One drawn token a row. Stays valid when its slots are drawn again, or released, before ``result``."""

    def __init__(self, slots: Sequence[int], tokens_B: torch.Tensor, logprobs: DrawnLogprobs | None) -> None:
        self.tokens = tokens_B
        """(B,) int64 on the sampler's device; nobody writes to it afterwards."""
        self._slots = tuple(slots)
        self._logprobs = logprobs
        values = [tokens_B]
        if logprobs is not None:
            values += [logprobs.chosen, logprobs.top_ids, logprobs.top_values]
        self._copies = values
        self._copied: torch.cuda.Event | None = None
        if tokens_B.is_cuda:
            self._copies = [_to_pinned(value) for value in values]
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record(torch.cuda.current_stream(tokens_B.device))

    def ready(self) -> bool:
        """``result`` would not wait."""
        return self._copied is None or bool(self._copied.query())  # type: ignore[no-untyped-call]

    def result(self) -> list[SampledToken]:
        """The tokens in the order of the slots that were drawn; waits until they are on the host."""
        if self._copied is not None:
            self._copied.synchronize()
        tokens = self._copies[0].tolist()
        sampled = [
            SampledToken(slot=slot, token_id=token_id) for slot, token_id in zip(self._slots, tokens, strict=True)
        ]
        if self._logprobs is None:
            return sampled
        chosen, top_ids, top_values = (copy.tolist() for copy in self._copies[1:])
        for entry, (row, k) in enumerate(zip(self._logprobs.rows, self._logprobs.num_top, strict=True)):
            top = zip(top_ids[entry][:k], top_values[entry][:k], strict=True)
            sampled[row] = SampledToken(
                slot=self._slots[row],
                token_id=tokens[row],
                logprob=chosen[entry],
                top_logprobs=tuple(TokenLogprob(token_id=top_id, logprob=value) for top_id, value in top),
            )
        return sampled


def _to_pinned(value: torch.Tensor) -> torch.Tensor:
    host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    return host.copy_(value, non_blocking=True)
