"""What the LoRA kernels read: the table of resident adapters, the tiles of a step, and the shrunk activations.

Plain holders of device tensors; ``lora_tiles`` computes tiles on the host. Called by model_runner and by the launchers.
Legend: T tokens, K input features, O output columns, M modules of a site, R rank_cap.
"""

from dataclasses import dataclass
from enum import Enum

import torch

from loraplex_kernels.gpu.tuning import num_splits


class Site(Enum):
    """Projections that share an input: (first module, number of modules) in the order q, k, v, o, gate, up, down."""

    QKV = (0, 3)
    O = (3, 1)  # noqa: E741
    GATE_UP = (4, 2)
    DOWN = (6, 1)

    @classmethod
    def of_module(cls, module: int) -> "Site":
        """``module``: its number in that order."""
        return next(site for site in cls if site.first_module <= module < site.first_module + site.num_modules)

    @property
    def first_module(self) -> int:
        return self.value[0]

    @property
    def num_modules(self) -> int:
        return self.value[1]


ALL_SITES = frozenset(Site)
ATTENTION_SITES = frozenset((Site.QKV, Site.O))


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraTable:
    """Where every resident adapter's blocks lie. An adapter of more than ``MAX_RANK`` ranks, or cut into several pages,
    has consecutive records, its planes, whose products add up."""

    arena: torch.Tensor
    """(elements,) flat, in the dtype of the activations; 16-byte aligned."""
    entries: torch.Tensor
    """(records, layers * 7, 2) int64: [A, B] of a module as ``(element offset // 8) << 8 | (rank // 8)``, 0 where there
    is none. A is (rank, K) and B (rank, O), both row-major and dense, B with the scale folded in. A block's rank is a
    multiple of 8 up to ``MAX_RANK`` and the same for A and B."""

    @property
    def record_entries(self) -> int:
        """int64 values of a record."""
        return self.entries.shape[1] * 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraTiles:
    """Runs of tokens that share a record, cut into tiles; together they cover each token of the step at most once.

    Tiles of one row suit decode steps whose rows have adapters of their own: matrix-vector products. Results depend on
    ``tile_rows`` and ``rank_cap`` within rounding; where all steps have the same, no token depends on the others.

    Device tensors are int32 and may be longer than what is used, so that a captured graph can keep their addresses.
    """

    record: torch.Tensor
    """(>= num_tiles,): of the tile's adapter, its first plane; -1 where the tokens have none."""
    row: torch.Tensor
    """(>= num_tiles,): first token."""
    count: torch.Tensor
    """(>= num_tiles,): tokens, up to tile_rows; 0 for a dead tile."""
    planes: torch.Tensor
    """(>= num_tiles,): planes of the adapter; 0 where there is none."""
    token_record: torch.Tensor
    """(>= T,): record of each token, as its tile's."""
    num_tiles: int
    """Tiles that kernels visit."""
    tile_rows: int
    """1, 16 or 64: the most tokens of a tile."""
    rank_cap: int
    """16 or 64, in tiles of one row also 8: no plane in the step has a larger rank."""
    max_planes: int = 1
    sites: frozenset[Site] = ALL_SITES
    """Where an adapter of the step may have something. Other projections run as in a step without LoRA."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingExpand:
    """A site's shrunk activations, for the operation that adds their expand to the projection's output.

    It adds plane 0 only: further planes of large adapters go into the output beforehand, by ``lora_expand_``.
    """

    table: LoraTable
    tiles: LoraTiles
    layer: int
    site: Site
    partial: torch.Tensor
    """(splits, T, M * R) fp32, from ``view_partial``, filled by ``lora_shrink``."""
    overlap: bool = False
    """The operation may start before its predecessor on the stream ends, which must not write adapters or tiles."""


def partial_elements(num_tokens: int, in_features: int, site: Site, rank_cap: int) -> int:
    """fp32 elements of the scratch of a site's shrink."""
    return num_splits(in_features, site.num_modules) * num_tokens * site.num_modules * rank_cap


def view_partial(scratch: torch.Tensor, num_tokens: int, in_features: int, site: Site, rank_cap: int) -> torch.Tensor:
    """(splits, T, M * R) fp32, the front of ``scratch``: flat fp32 of at least ``partial_elements``, one for all sites
    and layers in turn."""
    shape = (num_splits(in_features, site.num_modules), num_tokens, site.num_modules * rank_cap)
    return scratch[: shape[0] * shape[1] * shape[2]].view(shape)
