"""LoRA over segments: ``out += (x A^T) B`` for each adapter's run of tokens, fused where projections share an input.

The tokens of a step come sorted by adapter, so that a segment is a slice; tokens of no segment (base rows) cost
nothing. The scale is folded into B. Weights are views into the caller's arena, cut along the rank where a block is
larger than a page. Called by model_runner. Legend: T tokens, I inputs, O outputs, R stacked rank of a site.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpandPart:
    """Rows of one projection's B and where they act."""

    output: int
    """Index into ``LoraSite.output_sizes``."""
    weight: torch.Tensor
    """(R part, O of the projection): B transposed, dense, scale folded in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSite:
    """One adapter at one input of one layer: q/k/v share a site, gate/up another, o and down have their own.

    The parts of A, and those of all B together, cover the stacked rank once and in order; each projection's share of
    it is padded to a multiple of 8.
    """

    shrink: tuple[torch.Tensor, ...]
    """(I, R part) transposed views of A, stacked over the site's projections; together R columns."""
    expand: tuple[ExpandPart, ...]
    expand_ranks: tuple[int, ...]
    """R part of each of ``expand``; sums to R."""
    output_sizes: tuple[int, ...]
    """Columns of each projection in the fused output, whether the adapter touches it or not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSegment:
    """Tokens [start, end) of the step run through one adapter."""

    start: int
    end: int
    sites: Sequence[LoraSite | None]
    """By the model's site number; None where the adapter leaves the projections alone."""


def lora_shrink(x_TI: torch.Tensor, site: LoraSite) -> torch.Tensor:
    """``x A^T`` for all projections of the site at once: (T, I) -> new (T, R)."""
    if len(site.shrink) == 1:
        return x_TI.mm(site.shrink[0])
    return torch.cat([x_TI.mm(part_IR) for part_IR in site.shrink], dim=1)


def lora_expand_(out_TO: torch.Tensor, h_TR: torch.Tensor, site: LoraSite) -> None:
    """``out += h B`` in place, each projection into its own columns. ``out_TO`` may have any row stride."""
    # One split instead of two slices for each part: at decode sizes a slice costs as much as a product.
    outputs = (out_TO,) if len(site.output_sizes) == 1 else out_TO.split_with_sizes(site.output_sizes, 1)
    shrunk = (h_TR,) if len(site.expand) == 1 else h_TR.split_with_sizes(site.expand_ranks, 1)
    for part, h_TP in zip(site.expand, shrunk, strict=True):
        outputs[part.output].addmm_(h_TP, part.weight)


def lora_add_(out_TO: torch.Tensor, x_TI: torch.Tensor, segments: Sequence[LoraSegment], site: int) -> None:
    """Adds every segment's LoRA at ``site``: ``x_TI`` (T, I) in, ``out_TO`` (T, O) updated in place."""
    for segment in segments:
        weights = segment.sites[site]
        if weights is not None:
            rows = slice(segment.start, segment.end)
            lora_expand_(out_TO[rows], lora_shrink(x_TI[rows], weights), weights)
