"""``loraplex_kernels.sampling`` in Triton: no sort, no read-back; two launches for the rows without a cut, which read
the logits once, and four for those with one, which read them twice (see ``sampling_cut_kernels``).

Called by the sampler of the model runner.
Shape legend: B rows, R of them with a cut, V vocabulary, N blocks of a row, C candidates at most.
"""

from dataclasses import dataclass

import torch
import triton

from loraplex_kernels.gpu.sampling_cut_kernels import (
    GROUP,
    bound_kernel,
    collect_kernel,
    finish_kernel,
    stats_kernel,
)
from loraplex_kernels.gpu.sampling_kernels import pick_kernel, race_kernel
from loraplex_kernels.sampling import SamplingRows


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingBlocks:
    """Launch parameters; they change no token."""

    block: int = 2048
    """Tokens of one program, a power of two: a vocabulary of 128k is 63 programs, so that two rows fill an H100."""
    num_warps: int = 4
    candidates: int = 4096
    """Of a row with a cut, a power of two; where there are more, one program reads the whole row several times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scratch:
    """What the launches of one draw leave for each other, for ``max_rows`` rows."""

    max_rows: int
    cost: torch.Tensor
    """(max_rows, N) fp32"""
    reference: torch.Tensor
    """(max_rows, N) fp32"""
    token_id: torch.Tensor
    """(max_rows, N) int32"""
    block_max: torch.Tensor
    """(max_rows, N) fp32"""
    group_max: torch.Tensor
    """(max_rows, N, block / GROUP) fp32"""
    group_mass: torch.Tensor
    """(max_rows, N, block / GROUP) fp32"""
    bound: torch.Tensor
    """(max_rows, 2) fp32: what no kept logit lies below, the largest logit."""
    mass: torch.Tensor
    """(max_rows,) fp32"""
    count: torch.Tensor
    """(max_rows,) int32: candidates found, also those that did not fit."""
    candidate: torch.Tensor
    """(max_rows, C) fp32"""
    candidate_id: torch.Tensor
    """(max_rows, C) int32"""


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
        tokens_B = torch.empty(num_rows, dtype=torch.int64, device=self._device)
        out = (rows.slot, tokens_B, tokens_B if last_token is None else last_token)
        num_cut = rows.cut_rows.shape[0]
        if num_cut < num_rows:
            self._draw_uncut(logits_BV, rows, step, out, last=last_token is not None)
        if num_cut:
            self._draw_cut(logits_BV, rows, step, out, last=last_token is not None)
        return tokens_B

    def _draw_uncut(
        self, logits_BV: torch.Tensor, rows: SamplingRows, step: int, out: tuple[torch.Tensor, ...], *, last: bool
    ) -> None:
        num_rows, scratch = logits_BV.shape[0], self._scratch
        partial = (scratch.cost, scratch.reference, scratch.token_id)
        race_kernel[(self._num_blocks, num_rows)](
            logits_BV,
            logits_BV.stride(0),
            self._vocab_size,
            rows.seed,
            rows.index,
            step,
            rows.temperature,
            rows.cut_place,
            *partial,
            DRAWS=rows.num_drawing > rows.cut_rows.shape[0],
            CUTS=rows.cut_rows.shape[0] > 0,
            BLOCK=self._blocks.block,
            num_warps=self._blocks.num_warps,
        )
        pick_kernel[(num_rows,)](
            self._vocab_size,
            rows.temperature,
            rows.cut_place,
            *partial,
            *out,
            self._num_blocks,
            LAST=last,
            NP=triton.next_power_of_2(self._num_blocks),
            num_warps=1,
        )

    def _draw_cut(
        self, logits_BV: torch.Tensor, rows: SamplingRows, step: int, out: tuple[torch.Tensor, ...], *, last: bool
    ) -> None:
        num_cut, scratch = rows.cut_rows.shape[0], self._scratch
        logits = (logits_BV, logits_BV.stride(0), self._vocab_size)
        num_groups = self._num_blocks * (self._blocks.block // GROUP)
        stats_kernel[(self._num_blocks, num_cut)](
            *logits,
            rows.cut_rows,
            rows.temperature,
            scratch.block_max,
            scratch.group_max,
            scratch.group_mass,
            BLOCK=self._blocks.block,
            num_warps=self._blocks.num_warps,
        )
        bound_kernel[(num_cut,)](
            self._vocab_size,
            rows.cut_rows,
            rows.temperature,
            rows.top_k,
            rows.top_p,
            rows.min_p,
            scratch.block_max,
            scratch.group_max,
            scratch.group_mass,
            scratch.bound,
            scratch.mass,
            scratch.count,
            self._num_blocks,
            num_groups,
            NP=triton.next_power_of_2(self._num_blocks),
            GP=triton.next_power_of_2(num_groups),
            num_warps=4,
        )
        collect_kernel[(self._num_blocks, num_cut)](
            *logits,
            rows.cut_rows,
            scratch.block_max,
            scratch.bound,
            scratch.count,
            scratch.candidate,
            scratch.candidate_id,
            CANDIDATES=self._blocks.candidates,
            BLOCK=self._blocks.block,
            num_warps=self._blocks.num_warps,
        )
        finish_kernel[(num_cut,)](
            *logits,
            rows.seed,
            rows.index,
            step,
            rows.temperature,
            rows.top_k,
            rows.top_p,
            rows.min_p,
            rows.cut_rows,
            scratch.bound,
            scratch.mass,
            scratch.count,
            scratch.candidate,
            scratch.candidate_id,
            *out,
            LAST=last,
            BF16=logits_BV.dtype == torch.bfloat16,
            CANDIDATES=self._blocks.candidates,
            BLOCK=self._blocks.block,
            num_warps=8,
        )

    def _allocate(self, max_rows: int) -> _Scratch:
        blocks = (max_rows, self._num_blocks)
        groups = (*blocks, self._blocks.block // GROUP)
        candidates = (max_rows, self._blocks.candidates)

        def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=self._device)

        return _Scratch(
            max_rows=max_rows,
            cost=empty(blocks, torch.float32),
            reference=empty(blocks, torch.float32),
            token_id=empty(blocks, torch.int32),
            block_max=empty(blocks, torch.float32),
            group_max=empty(groups, torch.float32),
            group_mass=empty(groups, torch.float32),
            bound=empty((max_rows, 2), torch.float32),
            mass=empty((max_rows,), torch.float32),
            count=empty((max_rows,), torch.int32),
            candidate=empty(candidates, torch.float32),
            candidate_id=empty(candidates, torch.int32),
        )
