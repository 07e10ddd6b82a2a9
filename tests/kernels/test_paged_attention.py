"""Paged attention and the KV write against attention over whole sequences, head by head, in fp64."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_kernels import (
    AttentionRow,
    KvLayout,
    KvPages,
    kv_row_index,
    paged_attention,
    plan_attention,
    view_kv_pages,
    write_kv_,
)

CPU = torch.device("cpu")
NUM_LAYERS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequence:
    """Tokens [0, start) are in the pages; [start, end) come with the step."""

    start: int
    end: int


def attention_fp64(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position: int, window: int | None
) -> torch.Tensor:
    first = 0 if window is None else max(0, position - window + 1)
    keys, values = k[first : position + 1].double(), v[first : position + 1].double()
    weights = (keys @ q.double() / math.sqrt(q.shape[0])).softmax(0)
    return weights @ values


def run_step(
    sequences: list[Sequence],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    page_size: int = 4,
    window: int | None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Writes prefixes, then a step; returns (output of every layer, reference of every layer)."""
    layout = KvLayout(num_layers=NUM_LAYERS, num_kv_heads=kv_heads, head_dim=head_dim, page_size=page_size)
    counts = [-(-sequence.end // page_size) for sequence in sequences]
    num_pages = sum(counts) + 3
    shuffled = torch.randperm(num_pages).tolist()
    tables = [[shuffled.pop() for _ in range(count)] for count in counts]
    # Unused pages hold NaN: reading one of them shows.
    elements = torch.full((num_pages, layout.elements_per_page), float("nan"))
    elements[[page for table in tables for page in table]] = 0.0
    kv = view_kv_pages(elements.view(-1), layout)
    q_size, kv_size = heads * head_dim, kv_heads * head_dim
    full = [[torch.randn(s.end, q_size + 2 * kv_size) for s in sequences] for _ in range(NUM_LAYERS)]
    for layer in range(NUM_LAYERS):
        for sequence, table, qkv in zip(sequences, tables, full[layer], strict=True):
            write(kv, layer, table, 0, qkv[: sequence.start, q_size:])
    rows, first_token = [], 0
    for sequence, table in zip(sequences, tables, strict=True):
        num_tokens = sequence.end - sequence.start
        rows.append(AttentionRow(first_token=first_token, num_tokens=num_tokens, start=sequence.start, pages=table))
        first_token += num_tokens
    plan = plan_attention(rows, layout=layout, num_heads=heads, sliding_window=window, dtype=torch.float32, device=CPU)
    outputs, references = [], []
    for layer in range(NUM_LAYERS):
        for sequence, table, qkv in zip(sequences, tables, full[layer], strict=True):
            write(kv, layer, table, sequence.start, qkv[sequence.start :, q_size:])
        step_qkv = torch.cat([qkv[s.start :] for s, qkv in zip(sequences, full[layer], strict=True)])
        outputs.append(paged_attention(step_qkv, kv, layer, plan))
        expected = []
        for sequence, qkv in zip(sequences, full[layer], strict=True):
            q = qkv[:, :q_size].view(-1, heads, head_dim)
            k = qkv[:, q_size : q_size + kv_size].view(-1, kv_heads, head_dim)
            v = qkv[:, q_size + kv_size :].view(-1, kv_heads, head_dim)
            for position in range(sequence.start, sequence.end):
                per_head = [
                    attention_fp64(
                        q[position, n], k[:, n // (heads // kv_heads)], v[:, n // (heads // kv_heads)], position, window
                    )
                    for n in range(heads)
                ]
                expected.append(torch.cat(per_head))
        references.append(torch.stack(expected))
    return outputs, references


def write(kv: KvPages, layer: int, table: list[int], start: int, kv_TC: torch.Tensor) -> None:
    layout = kv.layout
    positions = torch.arange(start, start + kv_TC.shape[0])
    pages = torch.tensor(table)[positions // layout.page_size]
    index = kv_row_index(layout, pages, positions % layout.page_size)
    write_kv_(kv, layer, index, kv_TC.reshape(kv_TC.shape[0], layout.tiles_per_layer, layout.head_dim))


def check(outputs: list[torch.Tensor], references: list[torch.Tensor]) -> None:
    for output, reference in zip(outputs, references, strict=True):
        torch.testing.assert_close(output.double(), reference, rtol=0, atol=2e-5)


@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_mixed_step(window: int | None, heads: int, kv_heads: int) -> None:
    sequences = [
        Sequence(start=0, end=9),
        Sequence(start=12, end=13),
        Sequence(start=0, end=1),
        Sequence(start=7, end=20),
        Sequence(start=31, end=32),
    ]
    check(*run_step(sequences, heads=heads, kv_heads=kv_heads, window=window))


@pytest.mark.parametrize("window", [None, 6])
def test_pure_decode_of_very_different_lengths_is_split_into_groups(window: int | None) -> None:
    ends = [1, 90, 3, 88, 4, 5, 91, 2]
    sequences = [Sequence(start=end - 1, end=end) for end in ends]
    rows = [AttentionRow(first_token=i, num_tokens=1, start=end - 1, pages=range(24)) for i, end in enumerate(ends)]
    layout = KvLayout(num_layers=1, num_kv_heads=1, head_dim=4, page_size=4)
    plan = plan_attention(rows, layout=layout, num_heads=1, sliding_window=window, dtype=torch.float32, device=CPU)
    assert len(plan.decode) == (2 if window is None else 1)
    check(*run_step(sequences, window=window))


def test_window_gathers_only_the_pages_that_it_reaches() -> None:
    layout = KvLayout(num_layers=1, num_kv_heads=2, head_dim=4, page_size=4)
    row = AttentionRow(first_token=0, num_tokens=1, start=99, pages=range(25))
    plan = plan_attention([row], layout=layout, num_heads=2, sliding_window=8, dtype=torch.float32, device=CPU)
    assert plan.decode[0].tiles.numel() == 2 * 2 * 2


@settings(max_examples=40, deadline=None)
@given(
    spans=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 12)), min_size=1, max_size=6),
    window=st.one_of(st.none(), st.integers(1, 50)),
    page_size=st.sampled_from([1, 4, 16]),
)
def test_any_step(spans: list[tuple[int, int]], window: int | None, page_size: int) -> None:
    sequences = [Sequence(start=start, end=start + count) for start, count in spans]
    check(*run_step(sequences, head_dim=4, page_size=page_size, window=window))


def test_half_types_accumulate_in_fp32() -> None:
    layout = KvLayout(num_layers=1, num_kv_heads=1, head_dim=8, page_size=4)
    kv = view_kv_pages(torch.zeros(3 * layout.elements_per_page, dtype=torch.bfloat16), layout)
    qkv = torch.randn(10, 24).bfloat16()
    write(kv, 0, [2, 0, 1], 0, qkv[:, 8:])
    row = AttentionRow(first_token=0, num_tokens=1, start=9, pages=[2, 0, 1])
    plan = plan_attention([row], layout=layout, num_heads=1, sliding_window=None, dtype=torch.bfloat16, device=CPU)
    out = paged_attention(qkv[9:], kv, 0, plan)
    expected = attention_fp64(qkv[9, :8], qkv[:, 8:16], qkv[:, 16:], 9, None)
    torch.testing.assert_close(out[0].double(), expected, rtol=0, atol=2e-2)
