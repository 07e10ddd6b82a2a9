"""From logits to tokens: owns the sampling state of every row slot between its start and its release.

Does not know pages, adapters, text or stop strings. Called by the executor once per step, with the rows that sample.

Order of operations for one row, on fp32 logits:
  1. repetition penalty (transformers): seen in prompt or output -> logit / p if positive, else logit * p;
  2. frequency and presence penalty (OpenAI): logit -= count * frequency + (count > 0) * presence, output tokens only;
  3. logit_bias is added;
  4. below ``min_tokens``, end-of-sequence and stop ids are masked.
  Log-probabilities are those of the distribution here: before temperature and truncation.
  5. temperature; below ``MIN_TEMPERATURE`` the row is greedy;
  6. top_k, then top_p over what is left, then min_p (the order of transformers). Each is a lower bound on the
     probability, so that equally likely tokens stay or go together;
  7. an exponential race (``noise``) whose numbers depend on (seed, index of the generated token, token id) alone.

Shape legend: B rows of the step, R rows of one group, V vocabulary, C window of most likely tokens, P table rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from loraplex.core.model import ModelSpec
from loraplex.core.request import SamplingParams
from loraplex.core.step import RowStart
from loraplex.model_runner.drawn import Drawn, DrawnLogprobs
from loraplex.model_runner.noise import exponentials, row_key

MIN_TEMPERATURE = 1e-5
"""Below this the quotient logit / temperature loses all meaning in fp32; such rows take the argmax."""

MIN_LOGPROB = -9999.0
"""Stands for minus infinity in what is reported, since JSON has no word for it."""

_WINDOW = 256
"""top_k and top_p look at this many most likely tokens first, and at 16 times as many where that does not suffice."""

_Rows = slice | torch.Tensor
"""Rows of a group in the batch: ``slice(None)`` (no copy) when the group is the whole batch."""


@dataclass(slots=True, kw_only=True)
class _Slot:
    """State of one running request. Only ``num_output`` changes."""

    params: SamplingParams
    num_output: int
    bias_ids: tuple[int, ...]
    bias_values: tuple[float, ...]
    stop_ids: tuple[int, ...]
    penalised: bool

    @property
    def greedy(self) -> bool:
        return self.params.temperature < MIN_TEMPERATURE

    @property
    def masked(self) -> bool:
        return self.num_output < self.params.min_tokens and bool(self.stop_ids)


class _TokenTable:
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

    def start(self, slot: int, prompt: Sequence[int], output: Sequence[int]) -> None:
        if not self._free:
            self._grow()
        row = self._row_of[slot] = self._free.pop()
        counts = np.bincount(np.asarray(output, dtype=np.int64), minlength=self._vocab_size).astype(np.int32)
        self.counts_PV[row] = torch.from_numpy(counts).to(self._device)
        self.prompt_PV[row] = False
        self.prompt_PV[row, torch.tensor(prompt, dtype=torch.long, device=self._device)] = True

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
class _Penalties:
    rows: _Rows
    table_rows: torch.Tensor
    repetition: torch.Tensor
    frequency: torch.Tensor
    presence: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Truncation:
    """Of the drawing rows (``rows`` counts within them), those with top_k, top_p or min_p."""

    rows: _Rows
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Drawing:
    rows: _Rows
    indices: list[int]
    temperature: torch.Tensor
    truncation: _Truncation | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Logprobs:
    rows: _Rows
    indices: list[int]
    num_top: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """What the parameters of one set of rows say about the work to do; valid while the slots stay the same."""

    slots: tuple[int, ...]
    penalties: _Penalties | None
    bias: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    """Row, token id and value of each entry."""
    drawing: _Drawing | None
    logprobs: _Logprobs | None
    has_min_tokens: bool


class Sampler:
    """Draws one token per row. Not thread-safe; the executor owns it."""

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        self._spec = spec
        self._device = device
        self._slots: dict[int, _Slot] = {}
        self._table = _TokenTable(spec.vocab_size, device)
        self._batch: _Batch | None = None

    @torch.inference_mode()
    def start(self, start: RowStart) -> None:
        """Opens a slot. The state is rebuilt from the tokens, so that a preempted or migrated request goes on as it
        would have without."""
        params = start.sampling
        output = start.token_ids[start.num_prompt_tokens :]
        penalised = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty) != (1.0, 0.0, 0.0)
        self.release(start.slot)
        self._slots[start.slot] = _Slot(
            params=params,
            num_output=len(output),
            bias_ids=tuple(token_id for token_id, _ in params.logit_bias),
            bias_values=tuple(value for _, value in params.logit_bias),
            stop_ids=tuple(sorted({*self._spec.eos_token_ids, *params.stop_token_ids})),
            penalised=penalised,
        )
        if penalised:
            self._table.start(start.slot, start.token_ids[: start.num_prompt_tokens], output)

    def release(self, slot: int) -> None:
        """Forgets a slot. A slot that is not open is ignored."""
        self._slots.pop(slot, None)
        self._table.release(slot)
        self._batch = None

    @torch.inference_mode()
    def draw(self, logits_BV: torch.Tensor, slots: Sequence[int], *, last_token: torch.Tensor | None = None) -> Drawn:
        """Draws one token for each row and appends it to the row's slot; does not wait for the device.

        ``logits_BV``: (len(slots), vocab_size) fp32 or bf16 on the sampler's device; left as it is. ``slots``: open
        and distinct, at least one; KeyError when one is not open. ``last_token``: (num_slots,) int32 on the device,
        gets each row's token at its slot. The same slots may be drawn again before the result is read.
        """
        states = [self._slots[slot] for slot in slots]
        if self._batch is None or self._batch.slots != tuple(slots):
            self._batch = self._describe(slots, states)
        batch = self._batch
        edited_BV = self._edit(logits_BV.float(), batch, states)
        tokens_B = edited_BV.argmax(dim=-1)
        if batch.drawing is not None:
            drawn = [states[index] for index in batch.drawing.indices]
            keys = [row_key(state.params.seed, state.num_output) for state in drawn]
            noise_RV = exponentials(keys, self._spec.vocab_size, self._device)
            tokens_B[batch.drawing.rows] = _draw(edited_BV[batch.drawing.rows], batch.drawing, noise_RV)
        if batch.penalties is not None:
            self._table.add(batch.penalties.table_rows, tokens_B[batch.penalties.rows])
        if last_token is not None:
            last_token[self._vector(slots)] = tokens_B.to(torch.int32)
        for state in states:
            state.num_output += 1
        return Drawn(slots, tokens_B, _logprobs(edited_BV, tokens_B, batch.logprobs))

    def _describe(self, slots: Sequence[int], states: Sequence[_Slot]) -> _Batch:
        penalised = [i for i, state in enumerate(states) if state.penalised]
        biased = [i for i, state in enumerate(states) if state.bias_ids]
        drawn = [i for i, state in enumerate(states) if not state.greedy]
        with_logprobs = [i for i, state in enumerate(states) if state.params.num_logprobs is not None]
        bias = None
        if biased:
            bias = (
                self._vector([i for i in biased for _ in states[i].bias_ids]),
                self._vector([token_id for i in biased for token_id in states[i].bias_ids]),
                self._vector([value for i in biased for value in states[i].bias_values], torch.float32),
            )
        logprobs = None
        if with_logprobs:
            num_top = [min(states[i].params.num_logprobs or 0, self._spec.vocab_size) for i in with_logprobs]
            rows = self._rows(with_logprobs, len(states))
            logprobs = _Logprobs(rows=rows, indices=with_logprobs, num_top=num_top)
        return _Batch(
            slots=tuple(slots),
            penalties=self._describe_penalties(slots, states, penalised) if penalised else None,
            bias=bias,
            drawing=self._describe_drawing(states, drawn) if drawn else None,
            logprobs=logprobs,
            has_min_tokens=any(state.masked for state in states),
        )

    def _describe_penalties(self, slots: Sequence[int], states: Sequence[_Slot], indices: list[int]) -> _Penalties:
        params = [states[i].params for i in indices]
        return _Penalties(
            rows=self._rows(indices, len(states)),
            table_rows=self._vector(self._table.rows([slots[i] for i in indices])),
            repetition=self._column([p.repetition_penalty for p in params]),
            frequency=self._column([p.frequency_penalty for p in params]),
            presence=self._column([p.presence_penalty for p in params]),
        )

    def _describe_drawing(self, states: Sequence[_Slot], indices: list[int]) -> _Drawing:
        params = [states[i].params for i in indices]
        cut = [i for i, p in enumerate(params) if p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0]
        truncation = None
        if cut:
            truncation = _Truncation(
                rows=self._rows(cut, len(params)),
                top_k=self._column([min(params[i].top_k, self._spec.vocab_size) for i in cut], torch.long),
                top_p=self._column([params[i].top_p for i in cut], torch.float64),
                min_p=self._column([params[i].min_p for i in cut]),
            )
        return _Drawing(
            rows=self._rows(indices, len(states)),
            indices=indices,
            temperature=self._column([p.temperature for p in params]),
            truncation=truncation,
        )

    def _edit(self, logits_BV: torch.Tensor, batch: _Batch, states: Sequence[_Slot]) -> torch.Tensor:
        """Steps 1 to 4 of the module's list, on a copy when there is anything to do."""
        masked = [i for i, state in enumerate(states) if state.masked] if batch.has_min_tokens else []
        if batch.penalties is None and batch.bias is None and not masked:
            return logits_BV
        edited_BV = logits_BV.clone()
        if batch.penalties is not None:
            penalties = batch.penalties
            edited_BV[penalties.rows] = _penalise(edited_BV[penalties.rows], penalties, self._table)
        if batch.bias is not None:
            rows, token_ids, values = batch.bias
            edited_BV.index_put_((rows, token_ids), values, accumulate=True)
        if masked:
            rows = self._vector([i for i in masked for _ in states[i].stop_ids])
            token_ids = self._vector([token_id for i in masked for token_id in states[i].stop_ids])
            # Not minus infinity: a row whose every token is masked must still have a distribution.
            edited_BV[rows, token_ids] = torch.finfo(torch.float32).min
        return edited_BV

    def _rows(self, indices: list[int], num_rows: int) -> _Rows:
        return slice(None) if len(indices) == num_rows else self._vector(indices)

    def _vector(self, values: Sequence[float], dtype: torch.dtype = torch.long) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).to(self._device, non_blocking=True)

    def _column(self, values: Sequence[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self._vector(values, dtype).unsqueeze(1)


def _logprobs(edited_BV: torch.Tensor, tokens_B: torch.Tensor, group: _Logprobs | None) -> DrawnLogprobs | None:
    if group is None:
        return None
    logprobs_RV = edited_BV[group.rows].log_softmax(dim=-1)
    top = logprobs_RV.topk(max(group.num_top), dim=-1)
    return DrawnLogprobs(
        rows=group.indices,
        num_top=group.num_top,
        chosen=_reportable(logprobs_RV.gather(1, tokens_B[group.rows].unsqueeze(1))).squeeze(1),
        top_ids=top.indices,
        top_values=_reportable(top.values),
    )


def _reportable(logprobs: torch.Tensor) -> torch.Tensor:
    return logprobs.nan_to_num(nan=MIN_LOGPROB).clamp(min=MIN_LOGPROB)


def _penalise(logits_RV: torch.Tensor, penalties: _Penalties, table: _TokenTable) -> torch.Tensor:
    counts_RV = table.counts_PV[penalties.table_rows]
    output_RV = counts_RV > 0
    seen_RV = table.prompt_PV[penalties.table_rows] | output_RV
    repetition_R1 = penalties.repetition
    scaled_RV = torch.where(logits_RV > 0, logits_RV / repetition_R1, logits_RV * repetition_R1)
    logits_RV = torch.where(seen_RV, scaled_RV, logits_RV)
    return logits_RV - penalties.frequency * counts_RV - penalties.presence * output_RV


def _draw(logits_RV: torch.Tensor, group: _Drawing, noise_RV: torch.Tensor) -> torch.Tensor:
    """Token ids (R). Weights are probabilities relative to the likeliest token's, which is 1."""
    weights_RV = ((logits_RV - logits_RV.amax(dim=-1, keepdim=True)) / group.temperature).exp_()
    cut = group.truncation
    if cut is not None:
        cut_RV = weights_RV[cut.rows]
        bound_R1 = _lower_bound(cut_RV, cut.top_k, cut.top_p, _WINDOW)
        weights_RV[cut.rows] = cut_RV.masked_fill(cut_RV < torch.maximum(bound_R1, cut.min_p), 0.0)
    return weights_RV.div_(noise_RV).argmax(dim=-1)


def _lower_bound(weights_RV: torch.Tensor, top_k_R1: torch.Tensor, top_p_R1: torch.Tensor, window: int) -> torch.Tensor:
    """The smallest weight (R, 1) that top_k and then top_p keep, found among the ``window`` largest weights; rows
    where that does not suffice are done again with a larger window."""
    vocab_size = weights_RV.shape[1]
    window = min(window, vocab_size)
    top_RC = weights_RV.topk(window, dim=-1).values
    kth_R1 = top_RC.gather(1, (top_k_R1 - 1).clamp(0, window - 1))
    kth_R1 = torch.where(top_k_R1 > 0, kth_R1, torch.zeros_like(kth_R1))
    goal_R1 = top_p_R1 * weights_RV.masked_fill(weights_RV < kth_R1, 0.0).cumsum(-1, dtype=torch.float64)[:, -1:]
    top_RC = top_RC.masked_fill(top_RC < kth_R1, 0.0)
    cdf_RC = top_RC.cumsum(dim=-1, dtype=torch.float64)
    num_kept_R1 = ((cdf_RC < goal_R1).sum(dim=-1, keepdim=True) + 1).clamp_(max=window)
    nucleus_R1 = top_RC.gather(1, num_kept_R1 - 1)
    bound_R1 = torch.where(top_p_R1 < 1.0, torch.maximum(kth_R1, nucleus_R1), kth_R1)
    if window == vocab_size:
        return bound_R1
    # A zero at the end of the window: everything that top_k leaves lies inside it.
    enough_R1 = (cdf_RC[:, -1:] >= goal_R1) | (top_RC[:, -1:] == 0.0) | (top_p_R1 >= 1.0)
    rest_R = (~enough_R1 | (top_k_R1 > window)).squeeze(1)
    if bool(rest_R.any()):
        bound_R1[rest_R] = _lower_bound(weights_RV[rest_R], top_k_R1[rest_R], top_p_R1[rest_R], window * 16)
    return bound_R1
