"""Random adapters in an arena, and the tiles of a step, for tests and benchmarks of the LoRA kernels.

Blocks lie shuffled, as they do after some churn. Not for serving.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from loraplex_kernels.gpu.lora_table import LoraTable, LoraTiles, Site
from loraplex_kernels.gpu.lora_tiles import MAX_RANK, NUM_MODULES, build_tiles


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """Features of a decoder layer."""

    hidden: int
    q: int
    kv: int
    intermediate: int

    @property
    def modules(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of q, k, v, o, gate, up, down."""
        qkv = ((self.hidden, self.q), (self.hidden, self.kv), (self.hidden, self.kv))
        gate_up = ((self.hidden, self.intermediate),) * 2
        return (*qkv, (self.q, self.hidden), *gate_up, (self.intermediate, self.hidden))

    def inputs(self, site: Site) -> int:
        return self.modules[site.first_module][0]

    def outputs(self, site: Site) -> tuple[int, ...]:
        return tuple(width for _, width in self.modules[site.first_module :][: site.num_modules])


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    rank: int
    """A multiple of 8; above ``MAX_RANK`` the adapter takes several planes."""
    missing: frozenset[int] = frozenset()
    """Modules that it leaves alone."""

    @property
    def planes(self) -> int:
        return -(-self.rank // MAX_RANK)


def random_table(
    shape: LayerShape,
    num_layers: int,
    adapters: Sequence[Adapter],
    *,
    dtype: torch.dtype,
    device: torch.device,
    offset: int = 0,
    seed: int = 0,
) -> tuple[LoraTable, np.ndarray]:
    """The table, and the first record of each adapter. The first ``offset`` elements of the arena stay free, as does an
    end of 64 elements: both and all gaps hold NaN where the arena is small."""
    generator = np.random.default_rng(seed)
    planes = np.array([adapter.planes for adapter in adapters])
    records = np.cumsum(planes) - planes
    keys: list[tuple[int, int, int]] = []
    sizes: list[int] = []
    ranks: list[int] = []
    for record, adapter in zip(records.tolist(), adapters, strict=True):
        for plane in range(adapter.planes):
            rank = min(MAX_RANK, adapter.rank - plane * MAX_RANK)
            for module in set(range(NUM_MODULES)) - adapter.missing:
                for side in (0, 1):
                    for layer in range(num_layers):
                        keys.append((record + plane, layer * NUM_MODULES + module, side))
                        ranks.append(rank)
                        sizes.append(-(-rank * shape.modules[module][side] // 8) * 8)
    order = generator.permutation(len(keys))
    starts = np.zeros(len(keys), dtype=np.int64)
    ordered = np.array(sizes, dtype=np.int64)[order]
    starts[order] = offset + np.cumsum(ordered) - ordered
    entries = np.zeros((int(planes.sum()), num_layers * NUM_MODULES, 2), dtype=np.int64)
    index = np.array(keys)
    entries[index[:, 0], index[:, 1], index[:, 2]] = (starts // 8 << 8) | (np.array(ranks) // 8)
    used = int(ordered.sum())
    arena = torch.empty(offset + used + 64, dtype=dtype, device=device)
    if offset < 1 << 20:
        arena.fill_(float("nan"))
    arena[offset : offset + used].normal_(std=0.1, generator=torch.Generator(device).manual_seed(seed))
    return LoraTable(arena=arena, entries=torch.from_numpy(entries).to(device)), records


def device_tiles(
    records: np.ndarray,
    planes: np.ndarray,
    tokens: np.ndarray,
    *,
    tile_rows: int,
    rank_cap: int,
    device: torch.device,
    num_tiles: int | None = None,
) -> LoraTiles:
    """``build_tiles``, uploaded."""
    tiles = build_tiles(records, planes, tokens, tile_rows, num_tiles)
    record, row, count, plane_counts = torch.from_numpy(tiles.fields).to(device)
    return LoraTiles(
        record=record,
        row=row,
        count=count,
        planes=plane_counts,
        token_record=torch.from_numpy(tiles.token_record).to(device),
        num_tiles=tiles.fields.shape[1],
        tile_rows=tile_rows,
        rank_cap=rank_cap,
        max_planes=int(planes.max(initial=1)),
    )
