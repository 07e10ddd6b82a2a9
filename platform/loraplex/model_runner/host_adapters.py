"""The host tier of adapters: safetensors files read into one contiguous blob each, already in arena layout.

Owns the blobs (pinned where an accelerator copies from them) and the check of a file against its manifest. Does not
know pages' addresses. Called by the executor; ``stage`` from any thread.
"""

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from loraplex.core.adapter import AdapterBlock, AdapterManifest
from loraplex.core.errors import BadAdapter, Conflict, NotFound
from loraplex.core.ids import Digest
from loraplex.core.model import ModelSpec
from loraplex.model_runner.adapter_layout import AdapterLayout, AdapterPart, PlacedBlock, plan_adapter_layout

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedAdapter:
    layout: AdapterLayout
    blob: torch.Tensor
    """(layout.num_pages, page_bytes) uint8 on the host."""


class HostAdapters:
    def __init__(self, model: ModelSpec, *, page_bytes: int, dtype: torch.dtype, pin: bool) -> None:
        self._model = model
        self._page_bytes = page_bytes
        self._dtype = dtype
        self._pin = pin
        self._lock = threading.Lock()
        self._staged: dict[Digest, StagedAdapter] = {}
        self._noise: torch.Tensor | None = None

    def layout(self, manifest: AdapterManifest) -> AdapterLayout:
        """Pure. BadAdapter when the manifest does not fit the base."""
        return plan_adapter_layout(
            manifest.blocks, self._model, page_bytes=self._page_bytes, itemsize=self._dtype.itemsize
        )

    def stage(self, manifest: AdapterManifest, path: str) -> None:
        """Idempotent. Raises BadAdapter when the file is not what the manifest says, or overflows the dtype, NotFound
        when it is gone."""
        with self._lock:
            if manifest.digest in self._staged:
                return
        if manifest.base_model_id != self._model.base_model_id:
            raise BadAdapter(f"the adapter is for {manifest.base_model_id}, not for {self._model.base_model_id}")
        layout = self.layout(manifest)
        # Padding must be zero: it is read as ranks that add nothing.
        blob = torch.zeros((layout.num_pages, self._page_bytes), dtype=torch.uint8, pin_memory=self._pin)
        with _open(path) as file:
            _check_names(file, layout)
            for placed in layout.blocks:
                a_RI, b_RO = _read_block(file, placed.block, self._model, self._dtype)
                self._place(blob, layout, placed, a_RI, b_RO)
        with self._lock:
            self._staged.setdefault(manifest.digest, StagedAdapter(layout=layout, blob=blob))

    def stage_random(self, manifest: AdapterManifest, seed: int) -> None:
        """As ``stage`` with small random weights instead of a file, at the pace of memory: for benchmarks. Equal seeds
        give equal bytes. BadAdapter."""
        layout = self.layout(manifest)
        noise = self._random_noise()
        blob = torch.empty((layout.num_pages, self._page_bytes), dtype=torch.uint8, pin_memory=self._pin)
        offsets = random.Random(seed)
        for page in blob:
            start = offsets.randrange(0, self._page_bytes, self._dtype.itemsize)
            page.copy_(noise[start : start + self._page_bytes])
        for part in layout.parts:
            if part.placed is not None:
                # Without B the padding adds nothing, whatever A holds there.
                num_ranks = part.placed.rank_start + part.placed.block.lora_rank - part.rank_start
                self._view(blob, part)[max(0, num_ranks) :] = 0
        with self._lock:
            self._staged.setdefault(manifest.digest, StagedAdapter(layout=layout, blob=blob))

    def unstage(self, digest: Digest) -> None:
        with self._lock:
            self._staged.pop(digest, None)

    def get(self, digest: Digest) -> StagedAdapter:
        """Raises Conflict when the adapter was never staged, or unstaged."""
        with self._lock:
            staged = self._staged.get(digest)
        if staged is None:
            raise Conflict(f"adapter {digest} is not staged")
        return staged

    def _random_noise(self) -> torch.Tensor:
        """(2 * page_bytes,) uint8: elements of standard deviation 0.01. Made once."""
        with self._lock:
            if self._noise is None:
                generator = torch.Generator().manual_seed(0)
                elements = torch.empty(2 * self._page_bytes // self._dtype.itemsize, device="cpu")
                self._noise = elements.normal_(std=0.01, generator=generator).to(self._dtype).view(torch.uint8)
            return self._noise

    def _place(
        self, blob: torch.Tensor, layout: AdapterLayout, placed: PlacedBlock, a_RI: torch.Tensor, b_RO: torch.Tensor
    ) -> None:
        for part in layout.parts:
            if part.site == placed.site and (part.placed is None or part.placed == placed):
                source = a_RI if part.placed is None else b_RO
                start = max(part.rank_start, placed.rank_start)
                end = min(part.rank_end, placed.rank_start + source.shape[0])
                if start < end:
                    self._view(blob, part)[start - part.rank_start : end - part.rank_start].copy_(
                        source[start - placed.rank_start : end - placed.rank_start]
                    )

    def _view(self, blob: torch.Tensor, part: AdapterPart) -> torch.Tensor:
        num_rows = part.rank_end - part.rank_start
        num_bytes = num_rows * part.num_columns * self._dtype.itemsize
        flat = blob[part.page, part.offset_bytes : part.offset_bytes + num_bytes].view(self._dtype)
        return flat.view(num_rows, part.num_columns)


@contextmanager
def _open(path: str) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except FileNotFoundError as error:
        raise NotFound("the file of the adapter is gone: it was deleted") from error
    except (OSError, SafetensorError) as error:
        raise BadAdapter(f"{path}: not a readable safetensors file: {error}") from error


def _key(block: AdapterBlock, side: str) -> str:
    parent = "mlp" if block.module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    return f"base_model.model.model.layers.{block.layer}.{parent}.{block.module}.lora_{side}.weight"


def _check_names(file: Any, layout: AdapterLayout) -> None:
    expected = {_key(placed.block, side) for placed in layout.blocks for side in "AB"}
    found = set(file.keys())
    if found != expected:
        odd = min(found ^ expected)
        raise BadAdapter(f"tensor {odd} is {'not in the manifest' if odd in found else 'missing from the file'}")


def _read_block(
    file: Any, block: AdapterBlock, model: ModelSpec, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """A (lora_rank, in_features) and B transposed, (lora_rank, out_features), the scale folded in, in ``dtype``."""
    in_features, out_features = model.projection_shape(block.module)
    tensors = []
    for side, shape in (("A", (block.lora_rank, in_features)), ("B", (out_features, block.lora_rank))):
        name = _key(block, side)
        tensor: torch.Tensor = file.get_tensor(name)
        if tuple(tensor.shape) != shape or tensor.dtype not in _DTYPES:
            raise BadAdapter(f"tensor {name} is {tensor.dtype} {tuple(tensor.shape)}, {shape} expected")
        scaled = (tensor.float() * (block.scale if side == "B" else 1.0)).to(dtype)
        if not scaled.isfinite().all():
            raise BadAdapter(f"tensor {name} holds values that are not finite in {dtype}")
        tensors.append(scaled)
    return tensors[0], tensors[1].t()
