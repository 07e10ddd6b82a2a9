"""What a step has to do, summed over its rows: tokens, attention pairs, KV, adapters. No hardware here.

Everything is an array over S steps, so that a whole run, or every candidate of a planner, is one call.
Called by ``bench`` with recorded steps and by tests, simulator and planner with imagined ones.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import numpy.typing as npt

from loraplex.core.adapter import AdapterBlock
from loraplex.core.model import ModelSpec
from loraplex.cost.ceilings import FloatArray

_RANK_MULTIPLE = 8
ROW_PARALLEL_MODULES = ("o_proj", "down_proj")
"""Split by rows under tensor parallelism: their A is divided and their B is whole; of the others the reverse."""

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterWork:
    """Elements of A and B, and of the outputs that they add to, over all layers; each a number per step, (S,).

    Of one adapter, of the distinct adapters of a step, or summed over the tokens of a step. ``sharded`` is what tensor
    parallelism divides: B of the projections that are split by columns, A of those split by rows.
    """

    sharded: FloatArray
    replicated: FloatArray
    sharded_outputs: FloatArray
    replicated_outputs: FloatArray

    @classmethod
    def of_blocks(cls, blocks: Iterable[AdapterBlock], model: ModelSpec) -> Self:
        """One adapter, arrays of shape (1,); ranks rounded up to multiples of 8, as they are stored."""
        sums = np.zeros(4)
        for block in blocks:
            lora_rank = padded_rank(block.lora_rank)
            in_features, out_features = model.projection_shape(block.module)
            if block.module in ROW_PARALLEL_MODULES:
                sums += (lora_rank * in_features, lora_rank * out_features, 0, out_features)
            else:
                sums += (lora_rank * out_features, lora_rank * in_features, out_features, 0)
        return cls(sharded=sums[0:1], replicated=sums[1:2], sharded_outputs=sums[2:3], replicated_outputs=sums[3:4])

    @classmethod
    def none(cls, num_steps: int) -> Self:
        return cls(**{field.name: np.zeros(num_steps) for field in fields(cls)})

    @property
    def elements(self) -> FloatArray:
        return self.sharded + self.replicated


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """S steps; each field (S,)."""

    num_tokens: FloatArray
    num_sampled: FloatArray
    """Rows after which a token is drawn: the rows of the logits."""
    kv_read_tokens: FloatArray
    """Keys that attention reads, each row's context once (values likewise)."""
    attended_pairs: FloatArray
    """(query, key) pairs that the mask leaves."""
    adapters: AdapterWork
    """Sum over the distinct adapters of the step: what is read."""
    lora: AdapterWork
    """Sum over the tokens of the step of their adapters: what is computed."""

    def __len__(self) -> int:
        return int(self.num_tokens.shape[0])


def step_work(
    model: ModelSpec,
    *,
    step: IntArray,
    start: IntArray,
    num_tokens: IntArray,
    samples: npt.NDArray[np.bool_],
    adapter: IntArray,
    sizes: Sequence[AdapterWork],
    num_steps: int,
) -> StepWork:
    """Sums the rows of ``num_steps`` steps. Arguments from ``step`` to ``adapter`` have one element per row, (B,):
    ``step`` 0 <= s < num_steps; tokens [start, start + num_tokens) of its sequence; ``adapter`` an index into ``sizes``
    or -1 for the plain base."""
    tokens = num_tokens.astype(np.float64)
    pairs, read = attention_of_rows(model, start=start, num_tokens=num_tokens)

    def per_step(values: FloatArray) -> FloatArray:
        return _sum_by(step, values, num_steps)

    with_adapter = adapter >= 0
    used_steps, used = np.divmod(np.unique(step[with_adapter] * len(sizes) + adapter[with_adapter]), max(1, len(sizes)))

    def sums(steps: IntArray, indices: IntArray, weights: FloatArray) -> AdapterWork:
        values = {}
        for field in fields(AdapterWork):
            table = np.array([getattr(size, field.name)[0] for size in sizes], dtype=np.float64)
            values[field.name] = _sum_by(steps, table[indices] * weights, num_steps)
        return AdapterWork(**values)

    no_adapter = AdapterWork.none(num_steps)
    return StepWork(
        num_tokens=per_step(tokens),
        num_sampled=per_step(samples.astype(np.float64)),
        kv_read_tokens=per_step(read),
        attended_pairs=per_step(pairs),
        adapters=sums(used_steps, used, np.ones(len(used))) if len(used) else no_adapter,
        lora=sums(step[with_adapter], adapter[with_adapter], tokens[with_adapter]) if len(used) else no_adapter,
    )


def padded_rank(lora_rank: int) -> int:
    """As it is stored: rounded up to a multiple of 8."""
    return -(-lora_rank // _RANK_MULTIPLE) * _RANK_MULTIPLE


def attention_of_rows(model: ModelSpec, *, start: IntArray, num_tokens: IntArray) -> tuple[FloatArray, FloatArray]:
    """Of rows that compute tokens [start, start + num_tokens) of their sequences, all (B,): the (query, key) pairs that
    the mask leaves, and the keys that are read, each once."""
    window = np.int64(model.sliding_window or np.iinfo(np.int64).max // 4)
    # The first `growing` tokens of a row see all that lies before them, the rest a full window.
    growing = np.clip(window - start, 0, num_tokens)
    pairs = growing * start + growing * (growing + 1) / 2 + (num_tokens - growing) * np.float64(window)
    read = np.minimum(start + num_tokens, window + num_tokens - 1)
    return np.asarray(pairs, dtype=np.float64), read.astype(np.float64)


def _sum_by(steps: IntArray, values: FloatArray, num_steps: int) -> FloatArray:
    return np.asarray(np.bincount(steps, weights=values, minlength=num_steps), dtype=np.float64)
