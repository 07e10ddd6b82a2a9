"""The sum over ranks fused with the norm. All ranks are on one device: on streams of a GPU, or in the interpreter one
after the other, with the flags of the others up beforehand."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from loraplex_kernels.gpu.lora import PendingExpand, Site, partial_elements, view_partial
from loraplex_kernels.gpu.lora_random import Adapter, LayerShape, device_tiles, random_table
from loraplex_kernels.gpu.peers import PeerRows, add_peers_rms_norm
from loraplex_kernels.gpu.twins import lora as twins

from tests.kernels.gpu.check import assert_close

EPS = 1e-5
MAX_ROWS = 16
SHAPE = LayerShape(hidden=72, q=80, kv=24, intermediate=1032)
LAYER = 1


class Stage:
    """Its ranks, which hold equal residuals."""

    def __init__(self, size: int, features: int, dtype: torch.dtype, device: torch.device) -> None:
        self._device = device
        buffers = [torch.zeros(2, 2, MAX_ROWS, features, dtype=dtype, device=device) for _ in range(size)]
        self._flags = [torch.zeros((MAX_ROWS, size), dtype=torch.int32, device=device) for _ in range(size)]
        parts = torch.tensor(
            [[buffer[turn, kind].data_ptr() for kind in range(2) for buffer in buffers] for turn in range(2)],
            device=device,
        )
        elements = partial_elements(MAX_ROWS, SHAPE.intermediate, Site.DOWN, 64)
        shrunk = [torch.full((2, elements), float("nan"), device=device) for _ in range(size)]
        shrunk_parts = torch.tensor([[part[turn].data_ptr() for part in shrunk] for turn in range(2)], device=device)
        self.ranks = [
            PeerRows(
                rank=rank,
                own=buffers[rank],
                parts=parts,
                shrunk=shrunk[rank],
                shrunk_parts=shrunk_parts,
                flags=torch.tensor([flags.data_ptr() for flags in self._flags], device=device),
                counts=torch.zeros(MAX_ROWS, dtype=torch.int32, device=device),
            )
            for rank in range(size)
        ]
        self.weight = torch.randn(features).to(device, dtype)
        self.compile()
        start = torch.randn(MAX_ROWS, features).to(device, dtype)
        self.residuals = [start.clone() for _ in range(size)]
        self.normed = [torch.empty_like(start) for _ in range(size)]

    def compile(self, pending: PendingExpand | None = None) -> None:
        """A GPU may load a kernel only when the others have ended, and theirs would wait for it."""
        features = self.weight.shape[0]
        for flags in self._flags:
            flags.fill_(1000)
        row = torch.zeros(1, features, dtype=self.weight.dtype, device=self._device)
        for rank in self.ranks:
            for added, overlap in ((False, False), (True, False), (False, True)):
                add_peers_rms_norm(
                    row,
                    self.weight,
                    EPS,
                    torch.empty_like(row),
                    rank,
                    0,
                    added=added,
                    pending=pending,
                    overlap=overlap,
                )
        for tensor in (*self._flags, *(rank.counts for rank in self.ranks)):
            tensor.zero_()

    def exchange(self, parts: Sequence[torch.Tensor], turn: int, pending: PendingExpand | None = None) -> None:
        """``parts``: of each rank, (buffers, T, D). ``pending``: of what the ranks have in ``shrunk``."""
        buffers, count, _ = parts[0].shape
        if self._device.type != "cuda":
            for flags in self._flags:
                flags.fill_(1000)
            for rank, part in zip(self.ranks, parts, strict=True):
                rank.own[turn, :buffers, :count] = part
        else:
            torch.cuda.synchronize()
        for rank, part, residual, normed in zip(self.ranks, parts, self.residuals, self.normed, strict=True):
            stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None  # type: ignore[no-untyped-call]
            with torch.cuda.stream(stream):  # type: ignore[arg-type]
                rank.own[turn, :buffers, :count].copy_(part)
                add_peers_rms_norm(
                    residual[:count],
                    self.weight,
                    EPS,
                    normed[:count],
                    rank,
                    turn,
                    added=buffers == 2,
                    pending=pending,
                    # A copy is all that comes before.
                    overlap=turn == 1 and buffers == 1,
                )
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    @property
    def announced(self) -> list[torch.Tensor]:
        return self._flags


@pytest.mark.parametrize(("size", "features"), [(2, 72), (4, 64)])
def test_every_rank_gets_the_sum_and_its_norm(
    size: int, features: int, dtype: torch.dtype, device: torch.device
) -> None:
    stage = Stage(size, features, dtype, device)
    exchanges = torch.zeros(MAX_ROWS, dtype=torch.int32)
    # Numbers of tokens and buffers change from step to step; each step takes both turns.
    for num_tokens, buffers in ((3, 1), (5, 2), (1, 2), (5, 1)):
        for turn in (0, 1):
            before = stage.residuals[0].double()
            parts = [torch.randn(buffers, num_tokens, features).to(device, dtype) for _ in range(size)]
            stage.exchange(parts, turn)
            before[:num_tokens] += sum(part.double().sum(0) for part in parts)
            rows = stage.residuals[0][:num_tokens].double()
            assert_close(stage.residuals[0], before)
            assert_close(
                stage.normed[0][:num_tokens],
                rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + EPS) * stage.weight.double(),
            )
            for residual, normed in zip(stage.residuals, stage.normed, strict=True):
                assert torch.equal(residual, stage.residuals[0])
                assert torch.equal(normed[:num_tokens], stage.normed[0][:num_tokens])
            exchanges[:num_tokens] += 1
            for rank, flags in enumerate(stage.announced):
                for peer in set(range(size)) - {rank}:
                    assert torch.equal(flags[:num_tokens, peer].cpu(), exchanges[:num_tokens])


@pytest.mark.parametrize(("rank_cap", "ranks"), [(8, (8, 8)), (16, (16, 8)), (64, (64, 24))])
@pytest.mark.parametrize("size", [2, 3])
def test_shrunk_activations_of_all_ranks_are_expanded(
    size: int, rank_cap: int, ranks: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Tokens without an adapter, or whose adapter leaves down alone, get the sum of the parts."""
    adapters = (*(Adapter(rank=rank) for rank in ranks), Adapter(rank=8, missing=frozenset({6})))
    table, records = random_table(SHAPE, LAYER + 1, adapters, dtype=dtype, device=device)
    used = np.array([-1, *records, records[0]], dtype=np.int32)
    ones = np.ones_like(used)
    tiles = device_tiles(used, ones, ones, tile_rows=1, rank_cap=rank_cap, device=device)
    stage = Stage(size, SHAPE.hidden, dtype, device)
    scratch = [rank.shrunk for rank in stage.ranks]
    partials = [
        [view_partial(own[turn], len(used), SHAPE.intermediate, Site.DOWN, rank_cap) for own in scratch]
        for turn in (0, 1)
    ]
    assert partials[0][0].shape[0] > 1, "several splits"

    def pending(partial: torch.Tensor) -> PendingExpand:
        return PendingExpand(table=table, tiles=tiles, layer=LAYER, site=Site.DOWN, partial=partial)

    stage.compile(pending(partials[0][0]))
    for turn in (0, 1, 0):
        for partial in partials[turn]:
            partial.copy_(torch.randn(partial.shape))
        before = stage.residuals[0][: len(used)].double()
        parts = [torch.randn(1, len(used), SHAPE.hidden).to(device, dtype) for _ in range(size)]
        lora = twins.expanded(torch.zeros_like(parts[0][0]), pending(sum(partials[turn])), (SHAPE.hidden,))
        stage.exchange(parts, turn, pending(partials[turn][0]))
        expected = before + sum(part[0].double() for part in parts) + lora.double()
        assert bool((lora[0] == 0).all())
        assert bool((lora[1] != 0).any())
        assert_close(stage.residuals[0][: len(used)], expected)
        for residual, normed in zip(stage.residuals, stage.normed, strict=True):
            assert torch.equal(residual, stage.residuals[0])
            assert torch.equal(normed[: len(used)], stage.normed[0][: len(used)])
