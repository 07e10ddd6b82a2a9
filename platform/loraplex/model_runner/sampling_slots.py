"""The sampling parameters of the open slots, on the host, and what those of one set of rows look like on the device.

One record a slot, so that a batch is described without a Python loop over its rows. Owned by ``sampler``.
Shape legend: B rows of the step, E entries (one a token that a row's parameters name).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from loraplex_kernels.sampling import SamplingRows

from loraplex.core.request import SamplingParams

MIN_TEMPERATURE = 1e-5
"""Below this the quotient logit / temperature loses all meaning in fp32; such rows take the argmax."""

_RECORD = np.dtype(
    [
        ("open", np.bool_),
        ("penalised", np.bool_),
        ("biased", np.bool_),
        ("num_output", np.int64),
        ("held_back_until", np.int64),  # min_tokens, or 0 where no token would be masked
        ("num_logprobs", np.int64),  # -1: none asked for
        ("seed", np.int64),
        ("top_k", np.int64),
        ("temperature", np.float64),
        ("top_p", np.float64),
        ("min_p", np.float64),
    ]
)
_INT_COLUMNS = ("seed", "num_output", "top_k")
_FLOAT_COLUMNS = ("temperature", "top_p", "min_p")
_NUM_COLUMNS = 3 + len(_INT_COLUMNS) + len(_FLOAT_COLUMNS)

Records = npt.NDArray[np.void]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entries:
    """Tokens that the parameters of some rows name, on the device."""

    rows: torch.Tensor
    """(E,) int64"""
    token_ids: torch.Tensor
    """(E,) int64"""
    values: torch.Tensor
    """(E,) fp32"""


class SamplingSlots:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._records: Records = np.zeros(0, dtype=_RECORD)
        self._params: dict[int, SamplingParams] = {}
        self._stop_ids: dict[int, tuple[int, ...]] = {}

    def open(self, slot: int, params: SamplingParams, stop_ids: tuple[int, ...], num_output: int) -> None:
        """``stop_ids``: what ``min_tokens`` masks. ``num_output``: tokens generated so far."""
        if slot >= len(self._records):
            self._records = np.concatenate(
                [self._records, np.zeros(max(16, slot + 1, len(self._records)), dtype=_RECORD)]
            )
        drawing = params.temperature >= MIN_TEMPERATURE
        record = self._records[slot]
        record["open"] = True
        record["penalised"] = is_penalised(params)
        record["biased"] = bool(params.logit_bias)
        record["num_output"] = num_output
        record["held_back_until"] = params.min_tokens if stop_ids else 0
        record["num_logprobs"] = -1 if params.num_logprobs is None else params.num_logprobs
        record["seed"] = params.seed
        record["top_k"] = params.top_k
        record["temperature"] = params.temperature if drawing else 0.0
        record["top_p"] = params.top_p
        record["min_p"] = params.min_p
        self._params[slot] = params
        self._stop_ids[slot] = stop_ids

    def close(self, slot: int) -> None:
        """A slot that is not open is ignored."""
        if self._params.pop(slot, None) is not None:
            del self._stop_ids[slot]
            self._records[slot]["open"] = False

    def records(self, slots: npt.NDArray[np.int64]) -> Records:
        """A copy (B,). KeyError when a slot is not open."""
        for slot in slots[slots >= len(self._records)]:
            raise KeyError(int(slot))
        records = self._records[slots]
        for slot in slots[~records["open"]]:
            raise KeyError(int(slot))
        return records

    def params(self, slot: int) -> SamplingParams:
        return self._params[slot]

    def advance(self, slots: npt.NDArray[np.int64]) -> None:
        """One token more was drawn for each."""
        self._records["num_output"][slots] += 1

    def held_back(self, slots: npt.NDArray[np.int64]) -> bool:
        """Whether some row has not reached its ``min_tokens``."""
        records = self._records[slots]
        return bool((records["num_output"] < records["held_back_until"]).any())

    def bias(self, slots: Sequence[int], rows: npt.NDArray[np.int64]) -> Entries:
        """``logit_bias`` of the batch's ``rows``."""
        return self._entries(
            [(row, token, value) for row in rows for token, value in self._params[slots[row]].logit_bias]
        )

    def stops(self, slots: Sequence[int], rows: npt.NDArray[np.int64], steps: npt.NDArray[np.int64]) -> Entries:
        """What ``min_tokens`` masks in the batch's ``rows``; the value is the step (``steps``) until which it does."""
        return self._entries(
            [
                (row, token, until)
                for row, until in zip(rows, steps, strict=True)
                for token in self._stop_ids[slots[row]]
            ]
        )

    def sampling_rows(self, slots: npt.NDArray[np.int64], records: Records) -> SamplingRows:
        """On the device, by one copy."""
        drawing = records["temperature"] > 0.0
        cut = drawing & ((records["top_k"] > 0) | (records["top_p"] < 1.0) | (records["min_p"] > 0.0))
        cut_rows = np.flatnonzero(cut)
        # Columns of even length start at multiples of 16 bytes: Triton builds a kernel anew for another alignment.
        width = len(slots) + len(slots) % 2
        host = torch.empty((_NUM_COLUMNS, width), dtype=torch.int64, pin_memory=self._device.type == "cuda")
        ints, floats = (view.numpy()[:, : len(slots)] for view in (host, host.view(torch.float64)))
        ints[0] = slots
        ints[1, : len(cut_rows)] = cut_rows
        ints[2] = np.where(cut, np.cumsum(cut) - 1, -1)
        for column, name in enumerate(_INT_COLUMNS, 3):
            ints[column] = records[name]
        for column, name in enumerate(_FLOAT_COLUMNS, 3 + len(_INT_COLUMNS)):
            floats[column] = records[name]
        on_device = host.to(self._device, non_blocking=True)
        device, device_floats = (view[:, : len(slots)] for view in (on_device, on_device.view(torch.float64)))
        return SamplingRows(
            slot=device[0],
            cut_rows=device[1, : len(cut_rows)],
            cut_place=device[2],
            seed=device[3],
            index=device[4],
            top_k=device[5],
            temperature=device_floats[6],
            top_p=device_floats[7],
            min_p=device_floats[8],
            num_drawing=int(drawing.sum()),
        )

    def vector(self, values: Sequence[float] | npt.NDArray[np.generic], dtype: torch.dtype) -> torch.Tensor:
        """On the device; pinned first, since a copy from pageable memory would wait for the device."""
        host = torch.as_tensor(values, dtype=dtype)
        if self._device.type == "cuda":
            host = host.pin_memory()
        return host.to(self._device, non_blocking=True)

    def _entries(self, entries: Sequence[tuple[int, int, float]]) -> Entries:
        rows, token_ids, values = zip(*entries, strict=True)
        return Entries(
            rows=self.vector(rows, torch.int64),
            token_ids=self.vector(token_ids, torch.int64),
            values=self.vector(values, torch.float32),
        )


def is_penalised(params: SamplingParams) -> bool:
    return (params.repetition_penalty, params.frequency_penalty, params.presence_penalty) != (1.0, 0.0, 0.0)
