"""The host tier of adapters: safetensors files read into one contiguous blob each, already in arena layout.

Owns which adapters are staged, the fill of their blobs (pinned where an accelerator copies from them) and the check of
a file against its manifest. Of each matrix it keeps the rank's part. Does not know pages' addresses. Called by the
executor; ``stage`` from any thread.
Shape legend: R lora rank, I input features, O output features.
"""

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open

from loraplex.core.adapter import AdapterManifest
from loraplex.core.errors import BadAdapter, Conflict, NotFound
from loraplex.core.ids import Digest
from loraplex.model_runner.adapter_layout import AdapterLayout, AdapterPart, PlacedBlock, plan_shard_layout
from loraplex.model_runner.host_pool import HostPool, HostRun
from loraplex.model_runner.shard import Shard

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_EXPONENT = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
"""Bits of the exponent: all set in infinities and NaN alone."""

_PIECE = 1 << 15
"""Elements that torch converts at once: the most that it works on in one thread. Staging runs beside the engine, and
must not take all cores; for the same reason whole tensors are copied by numpy, which knows no threads (and no bfloat16,
hence the bits)."""

_Bits = npt.NDArray[np.int16] | npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedAdapter:
    layout: AdapterLayout
    run: HostRun

    @property
    def blob(self) -> torch.Tensor:
        """(layout.num_pages, page_bytes) uint8 on the host."""
        return self.run.pages


class HostAdapters:
    def __init__(self, shard: Shard, *, page_bytes: int, dtype: torch.dtype, pin: bool) -> None:
        self._shard = shard
        self._page_bytes = page_bytes
        self._dtype = dtype
        self._pool = HostPool(page_bytes=page_bytes, pin=pin)
        self._lock = threading.Lock()
        self._staged: dict[Digest, StagedAdapter] = {}
        self._noise: torch.Tensor | None = None

    def layout(self, manifest: AdapterManifest) -> AdapterLayout:
        """Of the rank's part; pure. BadAdapter when the manifest does not fit the base."""
        return plan_shard_layout(
            manifest.blocks, self._shard, page_bytes=self._page_bytes, itemsize=self._dtype.itemsize
        )

    def stage(self, manifest: AdapterManifest, path: str) -> None:
        """Idempotent. Raises BadAdapter when the file is not what the manifest says, or overflows the dtype, NotFound
        when it is gone."""
        with self._lock:
            if manifest.digest in self._staged:
                return
        base = self._shard.model.base_model_id
        if manifest.base_model_id != base:
            raise BadAdapter(f"the adapter is for {manifest.base_model_id}, not for {base}")
        layout = self.layout(manifest)
        with self._filling(manifest.digest, layout) as blob, _open(path) as file:
            _check_names(file, manifest)
            for placed, parts in zip(layout.blocks, layout.block_parts, strict=True):
                self._read_block(file, placed, parts, blob)

    def stage_random(self, manifest: AdapterManifest, seed: int) -> None:
        """As ``stage`` with small random weights instead of a file, at the pace of memory: for benchmarks. Equal seeds
        give equal bytes. BadAdapter."""
        layout = self.layout(manifest)
        noise = self._random_noise()
        offsets = random.Random(seed)
        with self._filling(manifest.digest, layout) as blob:
            for page in blob:
                start = offsets.randrange(0, self._page_bytes, self._dtype.itemsize)
                page.copy_(noise[start : start + self._page_bytes])
            for placed, parts in zip(layout.blocks, layout.block_parts, strict=True):
                for part in parts:
                    self._clear_padding(blob, placed, part)

    def unstage(self, digest: Digest) -> None:
        """Idempotent."""
        with self._lock:
            staged = self._staged.pop(digest, None)
        if staged is not None:
            self._pool.give_back(staged.run)

    @contextmanager
    def lend(self, digest: Digest) -> Iterator[StagedAdapter]:
        """Its bytes stay as they are meanwhile, and until the events that ``run.copied_when`` is told of.

        Raises Conflict when the adapter was never staged, or unstaged.
        """
        with self._lock:
            staged = self._staged.get(digest)
            if staged is None:
                raise Conflict(f"adapter {digest} is not staged")
            self._pool.hold(staged.run)
        try:
            yield staged
        finally:
            self._pool.let_go(staged.run)

    def close(self) -> None:
        """Frees all blobs. Idempotent."""
        with self._lock:
            self._staged.clear()
        self._pool.close()

    @contextmanager
    def _filling(self, digest: Digest, layout: AdapterLayout) -> Iterator[torch.Tensor]:
        """The blob of an adapter that is staged when the body ends without an exception."""
        run = self._pool.take(layout.num_pages)
        staged = StagedAdapter(layout=layout, run=run)
        kept: StagedAdapter | None = None
        try:
            yield run.pages
            with self._lock:
                kept = self._staged.setdefault(digest, staged)
        finally:
            if kept is not staged:
                self._pool.give_back(run)

    def _random_noise(self) -> torch.Tensor:
        """(2 * page_bytes,) uint8: elements of standard deviation 0.01. Made once."""
        with self._lock:
            if self._noise is None:
                generator = torch.Generator().manual_seed(0)
                elements = torch.empty(2 * self._page_bytes // self._dtype.itemsize, device="cpu")
                self._noise = elements.normal_(std=0.01, generator=generator).to(self._dtype).view(torch.uint8)
            return self._noise

    def _read_block(self, file: Any, placed: PlacedBlock, parts: tuple[AdapterPart, ...], blob: torch.Tensor) -> None:
        """A (R, I) as it is, B (O, R) transposed and scaled, each straight into its place."""
        shard, block = self._shard, placed.block
        layer = shard.first_layer + block.layer
        inputs, outputs = shard.model.projection_shape(block.module)
        a_RI = self._read(file, _key(layer, block.module, "A"), (block.lora_rank, inputs), scale=1.0)
        b_OR = self._read(file, _key(layer, block.module, "B"), (outputs, block.lora_rank), scale=block.scale)
        a_RI, b_RO = a_RI[:, shard.inputs(block.module)], b_OR[shard.outputs(block.module)].T
        for part in parts:
            source = a_RI if part.placed is None else b_RO
            start = max(part.rank_start, placed.rank_start) - placed.rank_start
            end = min(part.rank_end - placed.rank_start, block.lora_rank)
            if start < end:
                first = placed.rank_start + start - part.rank_start
                np.copyto(self._bits(blob, part)[first : first + end - start], source[start:end])
            self._clear_padding(blob, placed, part)

    def _read(self, file: Any, name: str, shape: tuple[int, int], *, scale: float) -> _Bits:
        """The tensor times ``scale`` in our dtype, as bits. BadAdapter."""
        tensor: torch.Tensor = file.get_tensor(name)
        if tuple(tensor.shape) != shape or tensor.dtype not in _DTYPES:
            raise BadAdapter(f"tensor {name} is {tensor.dtype} {tuple(tensor.shape)}, {shape} expected")
        if tensor.dtype != self._dtype or scale != 1.0:
            scaled = torch.empty(shape, dtype=self._dtype, device="cpu")
            source, target = tensor.view(-1), scaled.view(-1)
            for start in range(0, len(source), _PIECE):
                # Rounded once, after the scale.
                target[start : start + _PIECE] = source[start : start + _PIECE].float().mul_(scale)
            tensor = scaled
        bits = _as_bits(tensor)
        exponent = _EXPONENT[self._dtype]
        if (bits & exponent).max() == exponent:
            raise BadAdapter(f"tensor {name} holds values that are not finite in {self._dtype}")
        return bits

    def _clear_padding(self, blob: torch.Tensor, placed: PlacedBlock, part: AdapterPart) -> None:
        """Ranks of ``part`` between the end of the block and the next multiple of 8 must add nothing."""
        start = max(placed.rank_start + placed.block.lora_rank, part.rank_start)
        end = min(placed.rank_end, part.rank_end)
        if start < end:
            self._bits(blob, part)[start - part.rank_start : end - part.rank_start] = 0

    def _bits(self, blob: torch.Tensor, part: AdapterPart) -> _Bits:
        """(ranks of the part, columns), a view of the blob."""
        num_rows = part.rank_end - part.rank_start
        num_bytes = num_rows * part.num_columns * self._dtype.itemsize
        flat = blob[part.page, part.offset_bytes : part.offset_bytes + num_bytes].view(self._dtype)
        return _as_bits(flat.view(num_rows, part.num_columns))


def _as_bits(tensor: torch.Tensor) -> _Bits:
    """A view of the same shape."""
    return tensor.view(torch.int32 if tensor.dtype.itemsize == 4 else torch.int16).numpy()


@contextmanager
def _open(path: str) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except FileNotFoundError as error:
        raise NotFound("the file of the adapter is gone: it was deleted") from error
    except (OSError, SafetensorError) as error:
        raise BadAdapter(f"{path}: not a readable safetensors file: {error}") from error


def _key(layer: int, module: str, side: str) -> str:
    parent = "mlp" if module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    return f"base_model.model.model.layers.{layer}.{parent}.{module}.lora_{side}.weight"


def _check_names(file: Any, manifest: AdapterManifest) -> None:
    expected = {_key(block.layer, block.module, side) for block in manifest.blocks for side in "AB"}
    found = set(file.keys())
    if found != expected:
        odd = min(found ^ expected)
        raise BadAdapter(f"tensor {odd} is {'not in the manifest' if odd in found else 'missing from the file'}")
