"""From logits to tokens: owns the sampling state of every row slot between its start and its release.

Does not know pages, adapters, text or stop strings. Called by the executor once per step, with the rows that sample.
Waits for the device nowhere but in ``Drawn.result``: what changes with every token (the index that keys the noise, the
counts that penalties look at) advances on the device, and copies to it come from pinned memory.

Order of operations for one row, on fp32 logits:
  1. repetition penalty (transformers): seen in prompt or output -> logit / p if positive, else logit * p;
  2. frequency and presence penalty (OpenAI): logit -= count * frequency + (count > 0) * presence, output tokens only;
  3. logit_bias is added;
  4. below ``min_tokens``, end-of-sequence and stop ids are masked.
  Log-probabilities are those of the distribution here: before temperature and truncation.
  5. ``loraplex_kernels.sampling``: temperature (below ``MIN_TEMPERATURE`` the row is greedy), top_k, then top_p over
     what is left, then min_p (the order of transformers); an exponential race whose numbers depend on (seed, index of
     the generated token, token id) alone.

Shape legend: B rows of the step, R rows of one group, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from loraplex_kernels.sampling import SamplingRows, draw_tokens

from loraplex.core.model import ModelSpec
from loraplex.core.step import RowStart
from loraplex.model_runner.drawn import Drawn, DrawnLogprobs
from loraplex.model_runner.penalties import Penalties, TokenTable, penalise
from loraplex.model_runner.sampling_slots import Entries, Records, SamplingSlots, is_penalised

MIN_LOGPROB = -9999.0
"""Stands for minus infinity in what is reported, since JSON has no word for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Logprobs:
    rows: torch.Tensor
    indices: list[int]
    num_top: list[int]


@dataclass(slots=True, kw_only=True)
class _Batch:
    """What the parameters of one set of rows say about the work to do; valid while the slots stay the same. Only
    ``step`` changes: how often the rows were drawn since."""

    slots: tuple[int, ...]
    slot_array: npt.NDArray[np.int64]
    rows: SamplingRows
    penalties: Penalties | None
    bias: Entries | None
    stops: Entries | None
    logprobs: _Logprobs | None
    step: int = 0


class Sampler:
    """Draws one token per row. Not thread-safe; the executor owns it."""

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        self._spec = spec
        self._device = device
        self._slots = SamplingSlots(device)
        self._table = TokenTable(spec.vocab_size, device)
        self._batch: _Batch | None = None
        self._draw_tokens = draw_tokens
        if device.type == "cuda":
            # Needs Triton, which a machine without a GPU may lack.
            from loraplex_kernels.gpu.sampling import TokenDrawer

            self._draw_tokens = TokenDrawer(spec.vocab_size, device).draw_tokens

    @torch.inference_mode()
    def start(self, start: RowStart) -> None:
        """Opens a slot. The state is rebuilt from the tokens, so that a preempted or migrated request goes on as it
        would have without."""
        params = start.sampling
        prompt, output = start.token_ids[: start.num_prompt_tokens], start.token_ids[start.num_prompt_tokens :]
        self.release(start.slot)
        stop_ids = tuple(sorted({*self._spec.eos_token_ids, *params.stop_token_ids}))
        self._slots.open(start.slot, params, stop_ids, num_output=len(output))
        if is_penalised(params):
            vectors = (self._slots.vector(tokens, torch.int64) for tokens in (prompt, output))
            self._table.start(start.slot, *vectors)

    def release(self, slot: int) -> None:
        """Forgets a slot. A slot that is not open is ignored."""
        self._slots.close(slot)
        self._table.release(slot)
        self._batch = None

    @torch.inference_mode()
    def draw(self, logits_BV: torch.Tensor, slots: Sequence[int], *, last_token: torch.Tensor | None = None) -> Drawn:
        """Draws one token for each row and appends it to the row's slot; does not wait for the device.

        ``logits_BV``: (len(slots), vocab_size) fp32 or bf16 on the sampler's device; left as it is. ``slots``: open
        and distinct, at least one; KeyError when one is not open. ``last_token``: (num_slots,) int32 on the device,
        gets each row's token at its slot. The same slots may be drawn again before the result is read.
        """
        if self._batch is None or self._batch.slots != tuple(slots):
            self._batch = self._describe(tuple(slots))
        batch = self._batch
        edited_BV = self._edit(logits_BV, batch)
        tokens_B = self._draw_tokens(edited_BV, batch.rows, batch.step, last_token=last_token)
        if batch.penalties is not None:
            self._table.add(batch.penalties.table_rows, tokens_B[batch.penalties.rows])
        self._slots.advance(batch.slot_array)
        batch.step += 1
        return Drawn(batch.slots, tokens_B, _logprobs(edited_BV, tokens_B, batch.logprobs))

    def _describe(self, slots: tuple[int, ...]) -> _Batch:
        slot_array = np.array(slots, dtype=np.int64)
        records = self._slots.records(slot_array)
        biased = np.flatnonzero(records["biased"])
        held_back = np.flatnonzero(records["num_output"] < records["held_back_until"])
        stops = None
        if len(held_back):
            steps = (records["held_back_until"] - records["num_output"])[held_back]
            stops = self._slots.stops(slots, held_back, steps)
        return _Batch(
            slots=slots,
            slot_array=slot_array,
            rows=self._slots.sampling_rows(slot_array, records),
            penalties=self._describe_penalties(slots, np.flatnonzero(records["penalised"])),
            bias=self._slots.bias(slots, biased) if len(biased) else None,
            stops=stops,
            logprobs=self._describe_logprobs(records),
        )

    def _describe_penalties(self, slots: tuple[int, ...], rows: npt.NDArray[np.int64]) -> Penalties | None:
        if not len(rows):
            return None
        penalised = [slots[row] for row in rows]
        params = [self._slots.params(slot) for slot in penalised]
        return Penalties(
            rows=self._slots.vector(rows, torch.int64),
            table_rows=self._slots.vector(self._table.rows(penalised), torch.int64),
            repetition=self._column([p.repetition_penalty for p in params]),
            frequency=self._column([p.frequency_penalty for p in params]),
            presence=self._column([p.presence_penalty for p in params]),
        )

    def _describe_logprobs(self, records: Records) -> _Logprobs | None:
        rows = np.flatnonzero(records["num_logprobs"] >= 0)
        if not len(rows):
            return None
        return _Logprobs(
            rows=self._slots.vector(rows, torch.int64),
            indices=rows.tolist(),
            num_top=np.minimum(records["num_logprobs"][rows], self._spec.vocab_size).tolist(),
        )

    def _edit(self, logits_BV: torch.Tensor, batch: _Batch) -> torch.Tensor:
        """Steps 1 to 4 of the module's list, on an fp32 copy when there is anything to do."""
        if batch.stops is not None and not self._slots.held_back(batch.slot_array):
            batch.stops = None
        if batch.penalties is None and batch.bias is None and batch.stops is None:
            return logits_BV
        edited_BV = logits_BV.to(torch.float32, copy=True)
        if batch.penalties is not None:
            rows = batch.penalties.rows
            edited_BV[rows] = penalise(edited_BV[rows], batch.penalties, self._table)
        if batch.bias is not None:
            edited_BV.index_put_((batch.bias.rows, batch.bias.token_ids), batch.bias.values, accumulate=True)
        if batch.stops is not None:
            at = (batch.stops.rows, batch.stops.token_ids)
            # Not minus infinity: a row whose every token is masked must still have a distribution.
            lowest = torch.finfo(torch.float32).min
            edited_BV[at] = torch.where(batch.stops.values > batch.step, lowest, edited_BV[at])
        return edited_BV

    def _column(self, values: Sequence[float]) -> torch.Tensor:
        return self._slots.vector(values, torch.float32).unsqueeze(1)


def _logprobs(edited_BV: torch.Tensor, tokens_B: torch.Tensor, group: _Logprobs | None) -> DrawnLogprobs | None:
    if group is None:
        return None
    logprobs_RV = edited_BV[group.rows].float().log_softmax(dim=-1)
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
