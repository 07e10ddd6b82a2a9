"""A projection with its LoRA: which kernels run beside the GEMM and which after it.

Owns the scratch of shrunk activations and the second stream; knows neither weights nor what follows the projection.
Called by model_runner. Legend: T tokens, K input features, O output columns.
"""

from collections.abc import Callable, Sequence

import torch

from loraplex_kernels.gpu import tuning
from loraplex_kernels.gpu.lora import (
    LoraTable,
    LoraTiles,
    PendingExpand,
    Site,
    lora_expand_,
    lora_shrink,
    partial_elements,
    view_partial,
)
from loraplex_kernels.gpu.lora_tiles import MAX_RANK
from loraplex_kernels.gpu.tuning import Schedule


class LoraProjections:
    def __init__(
        self,
        table: LoraTable,
        in_features: dict[Site, int],
        widths: dict[Site, tuple[int, ...]],
        max_tokens: int,
        *,
        batch_invariant: bool = False,
        partial_sums: bool = False,
    ) -> None:
        """``in_features``, ``widths``: of each site, its input features and the columns of its modules.

        ``batch_invariant``: the same operations in every step, so that tokens meet the same arithmetic whatever the
        others are, given ``tile_rows`` and ``rank_cap`` of always the same value. Rows without an adapter do so even
        in steps that have no LoRA. ``partial_sums``: what sites of one module (o and down) put out is to be summed over
        shards, so their LoRA is added at once, or summed shrunk.
        """
        device = table.arena.device
        self._table = table
        self._widths = widths
        self._batch_invariant = batch_invariant
        self._partial_sums = partial_sums
        self.scratch = torch.empty(
            max(partial_elements(max_tokens, size, site, MAX_RANK) for site, size in in_features.items()),
            dtype=torch.float32,
            device=device,
        )
        features = in_features[Site.DOWN]
        self._shrunk_ahead = torch.empty(
            partial_elements(max_tokens, features, Site.DOWN, MAX_RANK), dtype=torch.float32, device=device
        )
        self._down_features = features
        self._side: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def ahead(self, num_tokens: int, layer: int, tiles: LoraTiles) -> PendingExpand | None:
        """Where the operation before down is to leave its shrink, for ``project``; None: nowhere."""
        if self._batch_invariant or tiles.max_planes > 1 or Site.DOWN not in tiles.sites:
            return None
        if not tuning.shrinks_ahead(num_tokens, tiles.tile_rows):
            return None
        partial = view_partial(self._shrunk_ahead, num_tokens, self._down_features, Site.DOWN, tiles.rank_cap)
        return PendingExpand(table=self._table, tiles=tiles, layer=layer, site=Site.DOWN, partial=partial, overlap=True)

    def project(
        self,
        gemm: Callable[[], torch.Tensor],
        x_TK: torch.Tensor,
        layer: int,
        site: Site,
        tiles: LoraTiles,
        *,
        added_TO: torch.Tensor | None = None,
        scratch: torch.Tensor | None = None,
        shrunk: PendingExpand | None = None,
    ) -> tuple[torch.Tensor, PendingExpand | torch.Tensor | None]:
        """``gemm()``, which is (T, O), and what the operation that follows has to add to it: its ``lora`` argument.

        ``added_TO``: if that is a tensor, let it be this one, also where partial sums would be added at once.
        ``scratch``: flat fp32 that the operation that follows can sum over the shards. What is pending at o or down
        with it is of what lies there.
        ``shrunk``: of ``ahead``, filled.
        """
        if site not in tiles.sites:
            return gemm(), None
        if shrunk is not None:
            return self._after(gemm(), shrunk.partial, layer, site, tiles, overlap=True)
        num_tokens = x_TK.shape[0]
        if scratch is not None and not self._sums_shrunk(num_tokens, tiles):
            scratch = None
        partial = view_partial(
            self.scratch if scratch is None else scratch, num_tokens, x_TK.shape[1], site, tiles.rank_cap
        )
        if tiles.max_planes > 1:
            out_TO = gemm()
            for plane in range(1, tiles.max_planes):
                lora_shrink(x_TK, self._table, layer, site, tiles, partial, plane=plane)
                self._expand(out_TO, partial, layer, site, tiles, plane=plane)
            lora_shrink(x_TK, self._table, layer, site, tiles, partial)
            return self._after(out_TO, partial, layer, site, tiles, overlap=False)
        schedule = Schedule.SERIAL
        if not self._batch_invariant:
            schedule = tuning.schedule(num_tokens, tiles.tile_rows, tiles.num_tiles)
        if schedule is Schedule.SERIAL or self._side is None:
            out_TO = gemm()
            lora_shrink(x_TK, self._table, layer, site, tiles, partial, overlap=True)
            if scratch is not None:
                return out_TO, self._pending(partial, layer, site, tiles, overlap=True)
            return self._after(out_TO, partial, layer, site, tiles, overlap=True)
        at_once = added_TO is None and self._is_summed(site)
        if scratch is not None:
            added_TO = None
        elif added_TO is None:
            added_TO = x_TK.new_empty((num_tokens, sum(self._widths[site])))
        main = torch.cuda.current_stream()
        self._side.wait_stream(main)
        with torch.cuda.stream(self._side):
            lora_shrink(x_TK, self._table, layer, site, tiles, partial)
            if added_TO is not None:
                self._expand(added_TO, partial, layer, site, tiles, add=False, overlap=True)
        out_TO = gemm()
        main.wait_stream(self._side)
        if added_TO is None:
            return out_TO, self._pending(partial, layer, site, tiles, overlap=False)
        if at_once:
            return out_TO.add_(added_TO), None
        return out_TO, added_TO

    def _after(
        self, out_TO: torch.Tensor, partial: torch.Tensor, layer: int, site: Site, tiles: LoraTiles, *, overlap: bool
    ) -> tuple[torch.Tensor, PendingExpand | None]:
        apart = site.num_modules == 1 and not tuning.fuses_norm(out_TO.shape[0], tiles.tile_rows)
        if apart or self._batch_invariant or self._is_summed(site):
            self._expand(out_TO, partial, layer, site, tiles, overlap=overlap)
            return out_TO, None
        return out_TO, self._pending(partial, layer, site, tiles, overlap=overlap)

    def _pending(
        self, partial: torch.Tensor, layer: int, site: Site, tiles: LoraTiles, *, overlap: bool
    ) -> PendingExpand:
        return PendingExpand(table=self._table, tiles=tiles, layer=layer, site=site, partial=partial, overlap=overlap)

    def _sums_shrunk(self, num_tokens: int, tiles: LoraTiles) -> bool:
        if self._batch_invariant or tiles.max_planes > 1:
            return False
        return tuning.fuses_peers_norm(num_tokens, tiles.tile_rows)

    def _is_summed(self, site: Site) -> bool:
        return self._partial_sums and site.num_modules == 1

    def _expand(
        self,
        out_TO: torch.Tensor,
        partial: torch.Tensor,
        layer: int,
        site: Site,
        tiles: LoraTiles,
        *,
        plane: int = 0,
        add: bool = True,
        overlap: bool = False,
    ) -> None:
        widths: Sequence[int] = self._widths[site]
        lora_expand_(out_TO, partial, self._table, layer, site, widths, tiles, plane=plane, add=add, overlap=overlap)
