"""Small host arrays to the device without waiting for it: through pinned memory, in the order of the stream."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

_ALIGN = 16
"""Elements; sections begin at multiples, so that Triton sees the same alignment in every step."""


def upload(values: npt.NDArray[np.int32], device: torch.device) -> torch.Tensor:
    """A new device tensor of the same shape; asynchronous on an accelerator."""
    staging = torch.empty(values.shape, dtype=torch.int32, pin_memory=device.type == "cuda")
    staging.numpy()[...] = values
    return staging.to(device, non_blocking=True)


def upload_sections(sections: Sequence[npt.NDArray[np.int32]], device: torch.device) -> list[torch.Tensor]:
    """One copy for all; returns a view for each of the one-dimensional ``sections``."""
    starts, total = _starts([len(section) for section in sections])
    packed = np.zeros(total, dtype=np.int32)
    for start, section in zip(starts, sections, strict=True):
        packed[start : start + len(section)] = section
    on_device = upload(packed, device)
    return [on_device[start : start + len(section)] for start, section in zip(starts, sections, strict=True)]


class FixedSections:
    """Sections at addresses that never change, for CUDA graphs: ``send`` replaces the leading elements of each."""

    def __init__(self, capacities: Sequence[int], device: torch.device) -> None:
        self._starts, total = _starts(capacities)
        self._buffer = torch.zeros(total, dtype=torch.int32, device=device)
        self.views = [
            self._buffer[start : start + capacity] for start, capacity in zip(self._starts, capacities, strict=True)
        ]

    def send(self, sections: Sequence[npt.NDArray[np.int32]]) -> None:
        """Asynchronous; what lies behind a section's end, and in sections that are not given, becomes 0."""
        staging = torch.zeros(self._buffer.shape, dtype=torch.int32, pin_memory=self._buffer.is_cuda)
        packed = staging.numpy()
        for start, section in zip(self._starts, sections, strict=False):
            packed[start : start + len(section)] = section
        self._buffer.copy_(staging, non_blocking=True)


def _starts(sizes: Sequence[int]) -> tuple[list[int], int]:
    starts, total = [], 0
    for size in sizes:
        starts.append(total)
        total += -(-size // _ALIGN) * _ALIGN
    return starts, total
