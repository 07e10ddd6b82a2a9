"""The sampling kernels against a plain reference that sorts, row by row in fp64."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch
import triton
import triton.language as tl
from loraplex_kernels.gpu import sampling_kernels as kernels
from loraplex_kernels.gpu.sampling import SamplingBlocks, TokenDrawer
from loraplex_kernels.noise import exponentials, row_keys
from loraplex_kernels.sampling import SamplingRows, draw_tokens

VOCAB = 199
BLOCK = 128
FEW = SamplingBlocks(block=BLOCK, num_warps=4, candidates=16)
"""Rows with a cut come with more candidates, and are searched whole."""
BLOCKS = SamplingBlocks(block=BLOCK, num_warps=4, candidates=256)


@dataclass(frozen=True, kw_only=True)
class Row:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 1
    index: int = 0

    @property
    def cut(self) -> bool:
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0)


def sampling_rows(rows: Sequence[Row], device: torch.device) -> SamplingRows:
    def column(values: Sequence[float], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    cut = [i for i, row in enumerate(rows) if row.cut]
    return SamplingRows(
        slot=column(range(len(rows), 0, -1)),
        seed=column([row.seed for row in rows]),
        index=column([row.index for row in rows]),
        temperature=column([row.temperature for row in rows], torch.float64),
        top_k=column([row.top_k for row in rows]),
        top_p=column([row.top_p for row in rows], torch.float64),
        min_p=column([row.min_p for row in rows], torch.float64),
        cut_rows=column(cut),
        cut_place=column([cut.index(i) if i in cut else -1 for i in range(len(rows))]),
        num_drawing=sum(row.temperature > 0 for row in rows),
    )


def kept(logits: npt.NDArray[np.float64], row: Row) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """(weights, which of them top_k, top_p and min_p leave)."""
    weights = np.exp((logits - logits.max()) / row.temperature)
    bound = 0.0
    if 0 < row.top_k < len(weights):
        bound = np.sort(weights)[-row.top_k]
    if row.top_p < 1.0:
        falling = np.sort(weights[weights >= bound])[::-1]
        bound = falling[np.searchsorted(falling.cumsum(), row.top_p * falling.sum())]
    return weights, weights >= max(bound, row.min_p)


def check(drawer: TokenDrawer, logits_BV: torch.Tensor, rows: Sequence[Row], steps: Sequence[int]) -> None:
    """Each token is the reference's, but where the reference's two best are all but tied."""
    described = sampling_rows(rows, logits_BV.device)
    for step in steps:
        tokens = drawer.draw_tokens(logits_BV, described, step).tolist()
        for row, logits_V, token in zip(rows, logits_BV.double().cpu().numpy(), tokens, strict=True):
            if row.temperature == 0.0:
                assert token == int(logits_V.argmax())
                continue
            weights, allowed = kept(logits_V, row)
            assert allowed[token], (row, step)
            keys = row_keys(torch.tensor([row.seed]), torch.tensor([row.index + step]))
            scores = np.where(allowed, weights, 0.0) / exponentials(keys, len(logits_V))[0].double().numpy()
            assert scores[token] >= scores.max() * (1 - 1e-5), (row, step)


def random_logits(num_rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return (torch.randn((num_rows, vocab_size), generator=generator) * 3.0).to(dtype).to(device)


@triton.jit
def _store_noise(uniform_ptr, exponential_ptr, seed_ptr, index_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    ids = tl.arange(0, BLOCK)
    uniform = kernels.uniforms(ids, tl.load(seed_ptr), tl.load(index_ptr))
    tl.store(uniform_ptr + ids, uniform)
    tl.store(exponential_ptr + ids, kernels.exponentials(uniform))


@pytest.mark.parametrize(("seed", "index"), [(0, 0), (1, 7), (123456789012345678, 4095), (2**63 - 1, 2**31)])
def test_noise_is_that_of_the_twin(seed: int, index: int, device: torch.device) -> None:
    """The uniform numbers bit for bit, the exponential ones within their rounding."""
    uniform, exponential = (torch.full((65536,), torch.nan, device=device) for _ in range(2))
    seed_1, index_1 = (torch.tensor([value], device=device) for value in (seed, index))
    _store_noise[(1,)](uniform, exponential, seed_1, index_1, BLOCK=65536)
    expected = exponentials(row_keys(seed_1.cpu(), index_1.cpu()), 65536)[0]
    assert torch.equal(-torch.log1p(-uniform.cpu()), expected)
    assert float((exponential.cpu() / expected - 1.0).abs().max()) < 4e-7


PLAIN = [Row(temperature=t, seed=s) for s, t in enumerate([0.0, 1.0, 0.3, 0.0, 2.0, 1e-4])]
CUTS = [
    Row(top_k=5, seed=2**63 - 1),
    Row(top_k=60, temperature=3.0, index=100),
    Row(top_p=0.9, seed=3),
    Row(top_p=0.37, temperature=2.5, seed=4),
    Row(top_p=0.999, temperature=4.0, seed=5),
    Row(min_p=0.05, temperature=2.0, seed=6),
    Row(top_k=40, top_p=0.8, min_p=0.02, temperature=1.4, seed=7),
    Row(top_k=90, top_p=0.95, temperature=5.0, seed=8),
]
EDGES = [
    Row(top_k=1, temperature=5.0),
    Row(top_k=VOCAB, temperature=3.0),
    Row(top_k=VOCAB + 9, temperature=3.0),
    Row(top_p=1e-9, temperature=5.0),
    Row(top_p=0.0, temperature=5.0),
    Row(top_p=1.0 - 1e-12, temperature=5.0),
    Row(min_p=1.0, temperature=5.0),
    Row(top_k=VOCAB, top_p=0.5, temperature=5.0),
    Row(temperature=0.0, top_k=3, top_p=0.5, min_p=0.1),
]


@pytest.mark.parametrize("rows", [PLAIN, CUTS, EDGES, [PLAIN[0], *CUTS[:3], PLAIN[1]], PLAIN[:1]], ids=lambda r: len(r))
@pytest.mark.parametrize("blocks", [BLOCKS, FEW], ids=["all candidates fit", "few fit"])
def test_tokens_are_those_of_the_reference(
    rows: list[Row], blocks: SamplingBlocks, dtype: torch.dtype, device: torch.device
) -> None:
    drawer = TokenDrawer(VOCAB, device, max_rows=2, blocks=blocks)
    check(drawer, random_logits(len(rows), VOCAB, dtype, device), rows, steps=[0, 5])


@pytest.mark.parametrize("blocks", [BLOCKS, FEW], ids=["all candidates fit", "few fit"])
def test_negative_and_all_but_equal_logits(blocks: SamplingBlocks, dtype: torch.dtype, device: torch.device) -> None:
    """The search crosses zero and the longest brackets."""
    rows = [Row(top_p=0.6, seed=1), Row(top_k=90, seed=2), Row(top_k=120, top_p=0.5, seed=3), Row(top_p=0.9, seed=4)]
    logits_BV = random_logits(4, VOCAB, torch.float32, device) * torch.tensor([[1e-3], [1e-3], [1.0], [1.0]]).to(device)
    logits_BV[2:] -= 40.0
    logits_BV[3] *= 1e-2
    check(TokenDrawer(VOCAB, device, blocks=blocks), logits_BV.to(dtype), rows, steps=[0])


def test_equal_tokens_stay_or_go_together(dtype: torch.dtype, device: torch.device) -> None:
    """Two values: 2.0 for 100 tokens and 1.0 for the others; whatever cuts inside the first keeps all of them."""
    logits_BV = torch.ones((3, VOCAB), dtype=dtype, device=device)
    logits_BV[:, 50:150] = 2.0
    rows = [Row(top_k=3, seed=1), Row(top_p=0.01, seed=2), Row(min_p=0.99, seed=3)]
    drawer = TokenDrawer(VOCAB, device, blocks=BLOCKS)
    check(drawer, logits_BV, rows, steps=range(3))
    drawn = {t for step in range(3) for t in drawer.draw_tokens(logits_BV, sampling_rows(rows, device), step).tolist()}
    assert len(drawn) > 5


def test_a_row_does_not_depend_on_the_others(device: torch.device) -> None:
    """Nor on the dtype, which another row's penalties change for all."""
    rows = [*PLAIN[:3], *CUTS[:4]]
    logits_BV = random_logits(len(rows), VOCAB, torch.bfloat16, device)
    drawer = TokenDrawer(VOCAB, device, blocks=BLOCKS)
    together = drawer.draw_tokens(logits_BV, sampling_rows(rows, device), 2).tolist()
    for place, row in enumerate(rows):
        alone = drawer.draw_tokens(logits_BV[place : place + 1].float(), sampling_rows([row], device), 2)
        assert alone.tolist() == [together[place]], row


def test_the_first_of_equal_logits_is_greedy(dtype: torch.dtype, device: torch.device) -> None:
    logits_BV = torch.zeros((3, VOCAB), dtype=dtype, device=device)
    logits_BV[0, [BLOCK + 3, BLOCK + 4, VOCAB - 1]] = 1.0
    logits_BV[1] = -torch.inf
    logits_BV[2, VOCAB - 1] = torch.inf
    drawer = TokenDrawer(VOCAB, device, blocks=BLOCKS)
    rows = sampling_rows([Row(temperature=0.0)] * 3, device)
    assert drawer.draw_tokens(logits_BV, rows, 0).tolist() == [BLOCK + 3, 0, VOCAB - 1]


@pytest.mark.parametrize("broken", [torch.nan, -torch.inf, torch.inf])
def test_broken_rows_yield_a_valid_id_and_leave_their_neighbour_alone(broken: float, device: torch.device) -> None:
    rows = [Row(temperature=0.0), Row(), Row(top_k=3), Row(top_p=0.5), Row(top_k=9, top_p=0.5, min_p=0.1)]
    rows = [*rows, Row(top_p=0.9, seed=6)]
    logits_BV = random_logits(len(rows), VOCAB, torch.bfloat16, device)
    drawer = TokenDrawer(VOCAB, device, blocks=BLOCKS)
    before = drawer.draw_tokens(logits_BV, sampling_rows(rows, device), 0).tolist()
    logits_BV[:-1] = broken
    tokens = drawer.draw_tokens(logits_BV, sampling_rows(rows, device), 0).tolist()
    assert all(0 <= token < VOCAB for token in tokens)
    assert tokens[-1] == before[-1]


def test_masked_and_infinite_logits(device: torch.device) -> None:
    """Minus infinity is never drawn; plus infinity always is."""
    rows = [
        Row(temperature=5.0, seed=s, top_p=p, top_k=k) for s, (p, k) in enumerate([(1.0, 0), (0.99, 0), (1.0, 150)])
    ]
    logits_BV = random_logits(3, VOCAB, torch.float32, device)
    logits_BV[:, 5:] = -torch.inf
    drawer = TokenDrawer(VOCAB, device, blocks=BLOCKS)
    assert max(drawer.draw_tokens(logits_BV, sampling_rows(rows, device), 0).tolist()) < 5
    logits_BV[:, 140] = torch.inf
    assert drawer.draw_tokens(logits_BV, sampling_rows(rows, device), 0).tolist() == [140] * 3


def test_last_token_and_rows_apart_in_memory(device: torch.device) -> None:
    rows = sampling_rows(PLAIN[:3], device)
    logits_BV = random_logits(3, 2 * VOCAB, torch.float32, device)[:, :VOCAB]
    last_token = torch.full((6,), -7, dtype=torch.int32, device=device)
    tokens = TokenDrawer(VOCAB, device, blocks=BLOCKS).draw_tokens(logits_BV, rows, 4, last_token=last_token)
    assert tokens.dtype == torch.int64
    assert last_token.tolist() == [-7, *reversed(tokens.tolist()), -7, -7]
    assert tokens.tolist() == draw_tokens(logits_BV, rows, 4).tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", [128256, 151936])
def test_realistic_sizes(vocab_size: int, dtype: torch.dtype) -> None:
    """At the default block, a mixed batch and one that outgrows the scratch."""
    device = torch.device("cuda")
    rows = [*PLAIN, *CUTS, *EDGES] * 2
    drawer = TokenDrawer(vocab_size, device, max_rows=8)
    check(drawer, random_logits(len(rows), vocab_size, dtype, device), rows, steps=[0])
