"""``loraplex_kernels.sampling`` in Triton: no sort, no read-back, two launches for rows without truncation.

Reads the logits once for greedy rows and for plain temperature; top_k and top_p each add one search of the row's
bound (see ``sampling_kernels``). Called by the sampler of the model runner.
Shape legend: B rows, R of them with a cut, V vocabulary, N blocks of a row.
"""

from dataclasses import dataclass

import torch
import triton

from loraplex_kernels.gpu.sampling_kernels import (
    NUM_CUTS,
    NUM_SUMS,
    pick_kernel,
    race_kernel,
    search_kernel,
    stats_kernel,
)
from loraplex_kernels.sampling import SamplingRows


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingBlocks:
    """Launch parameters; they change no token."""

    block: int = 4096
    """Tokens of one program, a power of two: a vocabulary of 128k is 32 programs, so that four rows fill an H100."""
    num_warps: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scratch:
    """What the launches of one draw leave for each other, for ``max_rows`` rows. The pairs are read and written in
    turns by the launches of a search."""

    max_rows: int
    cost: torch.Tensor
    """(max_rows, N) fp32"""
    reference: torch.Tensor
    """(max_rows, N) fp32"""
    token_id: torch.Tensor
    """(max_rows, N) int32"""
    block_max: torch.Tensor
    """(max_rows, N) fp32"""
    block_sum: torch.Tensor
    """(max_rows, N) fp32"""
    bracket: tuple[torch.Tensor, torch.Tensor]
    """(max_rows, 2) int64 each"""
    goal: tuple[torch.Tensor, torch.Tensor]
    """(max_rows,) fp64 each"""
    sums: tuple[torch.Tensor, torch.Tensor]
    """(max_rows, N, 16) fp32 each"""


class TokenDrawer:
    """Owns the scratch; all draws must be on one stream."""

    def __init__(
        self,
        vocab_size: int,
        device: torch.device,
        *,
        max_rows: int = 256,
        blocks: SamplingBlocks = SamplingBlocks(),
    ) -> None:
        """``max_rows``: as many rows need no new scratch."""
        self._vocab_size = vocab_size
        self._device = device
        self._blocks = blocks
        self._num_blocks = triton.cdiv(vocab_size, blocks.block)
        self._scratch = self._allocate(max_rows)

    def draw_tokens(
        self, logits_BV: torch.Tensor, rows: SamplingRows, step: int, *, last_token: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As ``loraplex_kernels.sampling.draw_tokens``. The rows of ``logits_BV`` are contiguous each."""
        num_rows, vocab_size = logits_BV.shape
        assert vocab_size == self._vocab_size, "logits of another vocabulary"
        assert logits_BV.stride(1) == 1, "the vocabulary must be the fastest dimension"
        if num_rows > self._scratch.max_rows:
            self._scratch = self._allocate(2 * num_rows)
        scratch = self._scratch
        num_cut = rows.cut_rows.shape[0]
        shift = 16 if logits_BV.dtype == torch.bfloat16 else 0
        blocks = {"BLOCK": self._blocks.block, "NP": triton.next_power_of_2(self._num_blocks)}
        side = 0
        if num_cut:
            stats_kernel[(self._num_blocks, num_cut)](
                logits_BV,
                logits_BV.stride(0),
                vocab_size,
                rows.cut_rows,
                rows.temperature,
                scratch.block_max,
                scratch.block_sum,
                BLOCK=self._blocks.block,
                num_warps=self._blocks.num_warps,
            )
        if rows.has_bound:
            num_launches = _launches_of_a_search(shift)
            begins = [pass_ == 0 for _ in range(1 + rows.has_both) for pass_ in range(num_launches)]
            for launch, begin in enumerate(begins):
                side = launch % 2
                search_kernel[(self._num_blocks, num_cut)](
                    logits_BV,
                    logits_BV.stride(0),
                    vocab_size,
                    rows.cut_rows,
                    rows.temperature,
                    rows.top_k,
                    rows.top_p,
                    scratch.block_max,
                    scratch.block_sum,
                    scratch.bracket[1 - side],
                    scratch.goal[1 - side],
                    scratch.sums[1 - side],
                    scratch.bracket[side],
                    scratch.goal[side],
                    scratch.sums[side],
                    BEGIN=begin,
                    SECOND=launch >= num_launches,
                    SHIFT=shift,
                    num_warps=self._blocks.num_warps,
                    **blocks,
                )
        race_kernel[(self._num_blocks, num_rows)](
            logits_BV,
            logits_BV.stride(0),
            vocab_size,
            rows.seed,
            rows.index,
            step,
            rows.temperature,
            rows.top_p,
            rows.min_p,
            rows.cut_place,
            scratch.block_max,
            scratch.block_sum,
            scratch.bracket[side],
            scratch.goal[side],
            scratch.sums[side],
            scratch.cost,
            scratch.reference,
            scratch.token_id,
            DRAWS=rows.num_drawing > 0,
            CUTS=num_cut > 0,
            SEARCHED=rows.has_bound,
            SHIFT=shift,
            num_warps=self._blocks.num_warps,
            **blocks,
        )
        tokens_B = torch.empty(num_rows, dtype=torch.int64, device=self._device)
        pick_kernel[(num_rows,)](
            rows.temperature,
            rows.slot,
            scratch.cost,
            scratch.reference,
            scratch.token_id,
            tokens_B,
            tokens_B if last_token is None else last_token,
            self._num_blocks,
            LAST=last_token is not None,
            NP=blocks["NP"],
            num_warps=1,
        )
        return tokens_B

    def _allocate(self, max_rows: int) -> _Scratch:
        shape = (max_rows, self._num_blocks)

        def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=self._device)

        return _Scratch(
            max_rows=max_rows,
            cost=empty(shape, torch.float32),
            reference=empty(shape, torch.float32),
            token_id=empty(shape, torch.int32),
            block_max=empty(shape, torch.float32),
            block_sum=empty(shape, torch.float32),
            bracket=(empty((max_rows, 2), torch.int64), empty((max_rows, 2), torch.int64)),
            goal=(empty((max_rows,), torch.float64), empty((max_rows,), torch.float64)),
            sums=(empty((*shape, NUM_SUMS), torch.float32), empty((*shape, NUM_SUMS), torch.float32)),
        )


def _launches_of_a_search(shift: int) -> int:
    """Until a bracket of all floats is one key wide."""
    width, launches = 1 << (32 - shift), 0
    while width > 1:
        width = -(-width // (NUM_CUTS + 1))
        launches += 1
    return launches
