"""Seconds of a step as a function of what it holds: non-negative coefficients, one affine piece per range of tokens.

A step's time is ``fixed + prefill? + lora? + rows + KV + pairs + adapters + g(tokens)``, where g rises piecewise
linearly: a product reads its weights however few tokens there are, and multiplies beyond. While the rows of a batch
stay the same only ``kv_tokens`` grows, so a run of decode steps is an arithmetic series.

Pure; imports numpy only. ``StepCoefficients.array`` and ``step_seconds`` are for compiled code: numba compiles
``step_seconds`` as it stands. Called by simulator, planner and profiler; made by ``analytic`` or by a fit.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Self

import msgspec
import numpy as np
import numpy.typing as npt

from loraplex.core.errors import BadConfig
from loraplex.core.model import ModelSpec
from loraplex.cost.ceilings import FloatArray
from loraplex.cost.work import IntArray, attention_of_rows

_DISTINCT_SHIFT = np.int64(1) << 32


@dataclass(frozen=True, slots=True, kw_only=True)
class StepComposition:
    """What S steps hold. Each field is a float array of shape (S,); single numbers count as S = 1.

    A decode row computes one token, a prefill row a chunk of two or more.
    """

    prefill_rows: FloatArray
    prefill_tokens: FloatArray
    prefill_pairs: FloatArray
    """(query, key) pairs of the prefill rows: a chunk of n tokens after s known ones has n * s + n * (n + 1) / 2."""
    decode_rows: FloatArray
    kv_tokens: FloatArray
    """Keys that attention reads: of each row, prefill or decode, its context with the new tokens, once."""
    num_adapters: FloatArray
    """Distinct adapters."""
    adapter_bytes: FloatArray
    """Of the distinct adapters, whole ones whatever the shape, ranks rounded up to multiples of 8."""
    lora_tokens: FloatArray
    """Tokens whose row has an adapter."""

    def __len__(self) -> int:
        return int(self.prefill_rows.shape[0])

    @classmethod
    def of(
        cls,
        *,
        prefill_rows: npt.ArrayLike = 0.0,
        prefill_tokens: npt.ArrayLike = 0.0,
        prefill_pairs: npt.ArrayLike = 0.0,
        decode_rows: npt.ArrayLike = 0.0,
        kv_tokens: npt.ArrayLike = 0.0,
        num_adapters: npt.ArrayLike = 0.0,
        adapter_bytes: npt.ArrayLike = 0.0,
        lora_tokens: npt.ArrayLike = 0.0,
    ) -> Self:
        """From numbers or arrays that broadcast to one (S,)."""
        values = (
            prefill_rows,
            prefill_tokens,
            prefill_pairs,
            decode_rows,
            kv_tokens,
            num_adapters,
            adapter_bytes,
            lora_tokens,
        )
        arrays = np.broadcast_arrays(*(np.atleast_1d(np.asarray(value, dtype=np.float64)) for value in values))
        return cls(**dict(zip((field.name for field in fields(cls)), arrays, strict=True)))

    @classmethod
    def of_rows(
        cls,
        model: ModelSpec,
        *,
        step: IntArray,
        start: IntArray,
        num_tokens: IntArray,
        adapter: IntArray,
        adapter_bytes: FloatArray,
        num_steps: int,
    ) -> Self:
        """Sums the rows of ``num_steps`` steps. ``step`` to ``adapter`` are (B,), one element per row, as in
        ``work.step_work``; ``adapter`` is an index into ``adapter_bytes`` (A,) or -1 for the plain base."""
        pairs, read = attention_of_rows(model, start=start, num_tokens=num_tokens)
        tokens = num_tokens.astype(np.float64)
        prefill = (num_tokens > 1).astype(np.float64)
        lora = adapter >= 0
        used_steps, used = np.divmod(np.unique(step[lora] * _DISTINCT_SHIFT + adapter[lora]), _DISTINCT_SHIFT)

        def total(values: FloatArray, steps: IntArray = step) -> FloatArray:
            return np.asarray(np.bincount(steps, weights=values, minlength=num_steps), dtype=np.float64)

        return cls(
            prefill_rows=total(prefill),
            prefill_tokens=total(prefill * tokens),
            prefill_pairs=total(prefill * pairs),
            decode_rows=total(1.0 - prefill),
            kv_tokens=total(read),
            num_adapters=total(np.ones(len(used)), used_steps),
            adapter_bytes=total(adapter_bytes[used], used_steps),
            lora_tokens=total(tokens * lora),
        )

    def take(self, chosen: npt.NDArray[np.bool_] | IntArray) -> Self:
        """The steps that a mask (S,) or indices choose."""
        return type(self)(**{field.name: getattr(self, field.name)[chosen] for field in fields(self)})

    @classmethod
    def joined(cls, parts: Iterable[Self]) -> Self:
        """All steps of ``parts`` (at least one), in their order."""
        several = tuple(parts)
        return cls(**{f.name: np.concatenate([getattr(part, f.name) for part in several]) for f in fields(cls)})


NUM_SCALARS = 10
"""Coefficients before the knots in ``StepCoefficients.array``, in the order of its fields."""


class StepCoefficients(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One time as a function of a composition. All seconds, none negative."""

    fixed_s: float = 0.0
    prefill_s: float = 0.0
    """Once in a step with a prefill row: it runs without a graph."""
    lora_s: float = 0.0
    """Once in a step with an adapter."""
    row_s: float = 0.0
    """Per row of either kind: logits, sampling, book-keeping."""
    prefill_row_s: float = 0.0
    """More per prefill row: attention apart from its pairs, the keys of its pages."""
    pair_s: float = 0.0
    kv_token_s: float = 0.0
    adapter_s: float = 0.0
    """Per distinct adapter."""
    adapter_byte_s: float = 0.0
    lora_token_s: float = 0.0
    token_knots: tuple[float, ...] = (0.0,)
    """Ascending, the first 0: where the slope over the step's tokens (prefill tokens + decode rows) changes."""
    token_slopes: tuple[float, ...] = (0.0,)
    """Seconds per token from each knot on, as many as knots."""

    def check(self, where: str) -> None:
        """Raises BadConfig beginning with ``where``: negative or endless numbers, knots out of order."""
        values = self.array()
        if not np.all(np.isfinite(values)) or np.any(values < 0):
            name = next(n for n in self.__struct_fields__ if not _is_sound(getattr(self, n)))
            raise BadConfig(f"{where}.{name}: a coefficient is negative or not finite", param=name)
        knots = self.token_knots
        if len(knots) != len(self.token_slopes) or not knots or knots[0] != 0 or any(np.diff(knots) <= 0):
            raise BadConfig(
                f"{where}.token_knots: must ascend from 0, with one slope for each ({len(knots)} knots, "
                f"{len(self.token_slopes)} slopes)",
                param="token_knots",
            )

    def array(self) -> FloatArray:
        """(NUM_SCALARS + 2 K,) float64: the scalars in the order of the fields, the K knots, the K slopes."""
        scalars = [getattr(self, name) for name in self.__struct_fields__[:NUM_SCALARS]]
        return np.array([*scalars, *self.token_knots, *self.token_slopes], dtype=np.float64)

    @classmethod
    def from_array(cls, values: FloatArray) -> Self:
        """The reverse of ``array``."""
        scalars, curve = values[:NUM_SCALARS].tolist(), values[NUM_SCALARS:].tolist()
        half = len(curve) // 2
        names = cls.__struct_fields__[:NUM_SCALARS]
        return cls(
            **dict(zip(names, scalars, strict=True)), token_knots=tuple(curve[:half]), token_slopes=tuple(curve[half:])
        )

    def slowed(self, factor: float) -> Self:
        """``factor`` times the time."""
        values = self.array()
        knots = slice(NUM_SCALARS, NUM_SCALARS + len(self.token_knots))
        slowed = values * factor
        slowed[knots] = values[knots]
        return self.from_array(slowed)

    def seconds(self, steps: StepComposition) -> FloatArray:
        """(S,)."""
        weights = np.array([*(getattr(self, n) for n in self.__struct_fields__[:NUM_SCALARS]), *self.token_slopes])
        return np.asarray(features(steps, self.token_knots) @ weights, dtype=np.float64)


def features(steps: StepComposition, token_knots: tuple[float, ...]) -> FloatArray:
    """(S, NUM_SCALARS + K): what each coefficient is multiplied by; seconds = features @ (scalars, slopes). What a fit
    solves for."""
    tokens = steps.prefill_tokens + steps.decode_rows
    ends = (*token_knots[1:], np.inf)
    columns = [
        np.ones(len(steps)),
        (steps.prefill_rows > 0).astype(np.float64),
        (steps.lora_tokens > 0).astype(np.float64),
        steps.prefill_rows + steps.decode_rows,
        steps.prefill_rows,
        steps.prefill_pairs,
        steps.kv_tokens,
        steps.num_adapters,
        steps.adapter_bytes,
        steps.lora_tokens,
        *(np.clip(tokens - start, 0.0, end - start) for start, end in zip(token_knots, ends, strict=True)),
    ]
    return np.stack(columns, axis=1)


def step_seconds(
    coefficients: FloatArray,
    prefill_rows: float,
    prefill_tokens: float,
    prefill_pairs: float,
    decode_rows: float,
    kv_tokens: float,
    num_adapters: float,
    adapter_bytes: float,
    lora_tokens: float,
) -> float:
    """``StepCoefficients.seconds`` of one step, from ``StepCoefficients.array``; scalars only, so that numba compiles
    it: ``numba.njit(step_seconds, inline="always")``."""
    tokens = prefill_tokens + decode_rows
    seconds: float = coefficients[0]
    if prefill_rows > 0.0:
        seconds += coefficients[1]
    if lora_tokens > 0.0:
        seconds += coefficients[2]
    seconds += coefficients[3] * (prefill_rows + decode_rows) + coefficients[4] * prefill_rows
    seconds += coefficients[5] * prefill_pairs + coefficients[6] * kv_tokens
    seconds += coefficients[7] * num_adapters + coefficients[8] * adapter_bytes + coefficients[9] * lora_tokens
    num_knots = (coefficients.shape[0] - NUM_SCALARS) // 2
    for index in range(num_knots):
        start = coefficients[NUM_SCALARS + index]
        if tokens <= start:
            break
        end = tokens
        if index + 1 < num_knots and coefficients[NUM_SCALARS + 1 + index] < tokens:
            end = coefficients[NUM_SCALARS + 1 + index]
        seconds += coefficients[NUM_SCALARS + num_knots + index] * (end - start)
    return seconds


class StepCost(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A step on a group of one shape.

    With pp stages up to ``pp`` micro-batches are under way; a request is in one of them at a time. With pp = 1 both
    times are the same: the time from the end of one step to the end of the next, the engine's work in between included.
    """

    interval: StepCoefficients
    """From the start of one micro-batch to that of the next, when the pipeline is full: the slowest stage."""
    latency: StepCoefficients
    """From the start of a micro-batch to its tokens: all stages and the hand-overs."""
    alone_s: float = 0.0
    """Of a pipeline: before a micro-batch that finds it empty, what the host does for it while no stage computes. With
    others under way, or one stage, whose next step is prepared while it computes, nothing waits for the host."""

    def check(self, where: str) -> None:
        """Raises BadConfig beginning with ``where``."""
        self.interval.check(f"{where}.interval")
        self.latency.check(f"{where}.latency")
        if not _is_sound(self.alone_s):
            raise BadConfig(f"{where}.alone_s: negative or not finite", param="alone_s")

    def slowed(self, factor: float) -> Self:
        """``factor`` times the time."""
        return type(self)(
            interval=self.interval.slowed(factor),
            latency=self.latency.slowed(factor),
            alone_s=self.alone_s * factor,
        )

    def interval_s(self, steps: StepComposition) -> FloatArray:
        """(S,) seconds."""
        return self.interval.seconds(steps)

    def latency_s(self, steps: StepComposition) -> FloatArray:
        """(S,) seconds."""
        return self.latency.seconds(steps)


def _is_sound(value: float | tuple[float, ...]) -> bool:
    return bool(np.all(np.isfinite(value)) and np.all(np.asarray(value) >= 0))
