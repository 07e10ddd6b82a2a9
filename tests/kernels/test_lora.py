"""Segmented LoRA against one dense product for each token, in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_kernels import ExpandPart, LoraSegment, LoraSite, lora_add_, lora_expand_, lora_shrink

IN_FEATURES = 20
WIDTHS = (12, 6, 6)
"""Output columns of three projections that share an input."""


def make_site(ranks: list[int], cut: int) -> tuple[LoraSite, torch.Tensor]:
    """A site with one rank for each projection (0: untouched), cut into parts of ``cut`` ranks; and its dense delta."""
    total = sum(ranks)
    a_RI = torch.randn(total, IN_FEATURES)
    expand: list[ExpandPart] = []
    dense = torch.zeros(IN_FEATURES, sum(WIDTHS), dtype=torch.float64)
    start = column = 0
    for output, (lora_rank, width) in enumerate(zip(ranks, WIDTHS, strict=True)):
        b_RO = torch.randn(lora_rank, width)
        dense[:, column : column + width] = a_RI[start : start + lora_rank].double().t() @ b_RO.double()
        for low in range(0, lora_rank, cut):
            expand.append(ExpandPart(output=output, weight=b_RO[low : low + cut]))
        start += lora_rank
        column += width
    shrink = tuple(a_RI[low : low + cut].t() for low in range(0, total, cut))
    expand_ranks = tuple(part.weight.shape[0] for part in expand)
    return LoraSite(shrink=shrink, expand=tuple(expand), expand_ranks=expand_ranks, output_sizes=WIDTHS), dense


@pytest.mark.parametrize("cut", [5, 100])
def test_shrink_then_expand(cut: int) -> None:
    site, dense = make_site([8, 0, 16], cut)
    x = torch.randn(3, IN_FEATURES)
    h = lora_shrink(x, site)
    assert h.shape == (3, 24)
    out = torch.ones(3, 40)
    lora_expand_(out[:, 4:28], h, site)
    expected = torch.ones(3, 40, dtype=torch.float64)
    expected[:, 4:28] += x.double() @ dense
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-4)


@settings(max_examples=50, deadline=None)
@given(
    runs=st.lists(
        st.tuples(st.integers(1, 5), st.lists(st.sampled_from([0, 8, 16]), min_size=3, max_size=3)), max_size=5
    ),
    base_rows=st.integers(0, 4),
    cut=st.sampled_from([8, 3, 64]),
)
def test_segments_of_any_adapters(runs: list[tuple[int, list[int]]], base_rows: int, cut: int) -> None:
    num_tokens = base_rows + sum(count for count, _ in runs)
    x, out = torch.randn(num_tokens, IN_FEATURES), torch.randn(num_tokens, sum(WIDTHS))
    expected = out.double()
    segments, start = [], base_rows
    for count, ranks in runs:
        site = None
        if any(ranks):
            site, dense = make_site(ranks, cut)
            expected[start : start + count] += x[start : start + count].double() @ dense
        segments.append(LoraSegment(start=start, end=start + count, sites=(None, site)))
        start += count
    untouched = out[:base_rows].clone()
    lora_add_(out, x, segments, 1)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-4)
    assert torch.equal(out[:base_rows], untouched)
    before = out.clone()
    lora_add_(out, x, segments, 0)
    assert torch.equal(out, before)
