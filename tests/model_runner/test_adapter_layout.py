"""Packing of adapters into pages: every rank placed once, nothing overlaps, any free pages serve."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex.core.adapter import AdapterBlock
from loraplex.core.errors import BadAdapter, BadConfig
from loraplex.core.ids import BaseModelId
from loraplex.core.model import LORA_MODULES, ModelSpec
from loraplex.model_runner.adapter_layout import SITES, AdapterLayout, plan_adapter_layout
from loraplex.model_runner.build import load_model_spec

SPEC = load_model_spec("random:tiny-llama", BaseModelId("base"))
ITEMSIZE = 4


def block(layer: int, module: str, lora_rank: int) -> AdapterBlock:
    return AdapterBlock(layer=layer, module=module, lora_rank=lora_rank, scale=1.0)


def plan(blocks: list[AdapterBlock], page_bytes: int = 8192, spec: ModelSpec = SPEC) -> AdapterLayout:
    return plan_adapter_layout(tuple(blocks), spec, page_bytes=page_bytes, itemsize=ITEMSIZE)


blocks_strategy = st.dictionaries(
    st.tuples(st.integers(0, SPEC.num_layers - 1), st.sampled_from(LORA_MODULES)), st.integers(1, 70), min_size=1
).map(lambda ranks: [block(layer, module, lora_rank) for (layer, module), lora_rank in ranks.items()])


@given(blocks=blocks_strategy, page_bytes=st.sampled_from([512, 2048, 8192, 65536]))
def test_every_rank_has_one_place(blocks: list[AdapterBlock], page_bytes: int) -> None:
    layout = plan(blocks, page_bytes)
    taken: dict[int, list[tuple[int, int]]] = {page: [] for page in range(layout.num_pages)}
    covered: dict[tuple[int, str], list[tuple[int, int]]] = {}
    for part in layout.parts:
        num_bytes = (part.rank_end - part.rank_start) * part.num_columns * ITEMSIZE
        assert part.offset_bytes % 128 == 0
        assert part.offset_bytes + num_bytes <= page_bytes
        taken[part.page].append((part.offset_bytes, part.offset_bytes + num_bytes))
        side = "A" if part.placed is None else part.placed.block.module
        covered.setdefault((part.site, side), []).append((part.rank_start, part.rank_end))
    for spans in taken.values():
        assert spans, "no page without a part"
        spans.sort()
        assert all(left[1] <= right[0] for left, right in itertools.pairwise(spans))
    padded = {(b.layer, b.module): -(-b.lora_rank // 8) * 8 for b in blocks}
    ranks = dict(layout.site_ranks)
    for (site, side), spans in covered.items():
        layer, modules = site // len(SITES), SITES[site % len(SITES)]
        starts, total = {}, 0
        for module in modules:
            starts[module] = total
            total += padded.get((layer, module), 0)
        first, last = (0, total) if side == "A" else (starts[side], starts[side] + padded[layer, side])
        assert total == ranks[site]
        assert spans[0][0] == first
        assert spans[-1][1] == last
        assert all(left[1] == right[0] for left, right in itertools.pairwise(spans))
    assert {(b.layer, b.module) for b in blocks} == {
        (site // len(SITES), side) for site, side in covered if side != "A"
    }


def test_order_of_blocks_does_not_matter() -> None:
    blocks = [block(1, "up_proj", 8), block(0, "v_proj", 4), block(0, "q_proj", 16)]
    assert plan(blocks) == plan(blocks[::-1])


def test_small_adapters_share_a_page_and_large_blocks_are_cut_at_multiples_of_8() -> None:
    assert plan([block(0, "q_proj", 8), block(1, "q_proj", 8)]).num_pages == 1
    parts = plan([block(0, "down_proj", 64)], page_bytes=8192).parts
    assert len(parts) == 4 + 2
    assert all((part.rank_end - part.rank_start) % 8 == 0 for part in parts)


@pytest.mark.parametrize(
    ("lora_ranks", "cuts"),
    [
        ((24, 24, 24), [24, 48]),
        ((8, 16, 24), [24]),
        # One that is larger than a page of 32 ranks is cut wherever it must be.
        ((40, 8, 24), [32, 48]),
    ],
)
def test_stacked_a_is_cut_between_its_blocks(lora_ranks: tuple[int, ...], cuts: list[int]) -> None:
    layout = plan([block(0, module, rank) for module, rank in zip(SITES[0], lora_ranks, strict=True)], page_bytes=8192)
    ends = [part.rank_end for part in layout.parts if part.placed is None]
    assert ends == [*cuts, sum(lora_ranks)]


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (block(2, "q_proj", 8), BadAdapter),
        (block(0, "lm_head", 8), BadAdapter),
        (block(0, "q_proj", 0), BadAdapter),
    ],
)
def test_blocks_that_do_not_fit_the_base(bad: AdapterBlock, error: type[Exception]) -> None:
    with pytest.raises(error, match=bad.module):
        plan([bad])


def test_a_page_smaller_than_one_rank_names_the_option() -> None:
    with pytest.raises(BadConfig, match="page_size"):
        plan([block(0, "down_proj", 8)], page_bytes=256)
