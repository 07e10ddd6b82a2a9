"""Stage cuts: never a slower slowest stage than any other cut has."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex.core.errors import BadConfig
from loraplex.core.ids import BaseModelId
from loraplex.cost.stages import cut_stages, decode_stages, equal_stages, slowest_stage
from loraplex.model_runner.random_models import random_spec

COST = st.integers(0, 50)


@given(costs=st.lists(COST, min_size=1, max_size=9), num_stages=st.integers(1, 5), first=COST, last=COST)
def test_no_other_cut_has_a_faster_slowest_stage(costs: list[int], num_stages: int, first: int, last: int) -> None:
    if num_stages > len(costs):
        with pytest.raises(BadConfig, match=f"{len(costs)} layers cannot be cut into {num_stages} stages"):
            cut_stages(costs, num_stages)
        return
    cut = cut_stages(costs, num_stages, first_cost=first, last_cost=last)
    assert len(cut) == num_stages
    assert sum(cut) == len(costs)
    assert min(cut) >= 1
    others = [
        [end - start for start, end in pairwise((0, *ends, len(costs)))]
        for ends in combinations(range(1, len(costs)), num_stages - 1)
    ]
    best = min(slowest_stage(other, costs, first_cost=first, last_cost=last) for other in others)
    assert slowest_stage(cut, costs, first_cost=first, last_cost=last) == best


@pytest.mark.parametrize(("num_layers", "num_stages"), [(32, 1), (32, 2), (30, 4), (7, 3)])
def test_layers_that_cost_the_same_are_cut_evenly(num_layers: int, num_stages: int) -> None:
    cut = cut_stages([1.0] * num_layers, num_stages)
    assert cut == equal_stages(num_layers, num_stages)


def test_the_last_stage_of_a_large_vocabulary_has_fewer_layers() -> None:
    """Llama 3 8B: the head is 2.4 layers' worth of weights."""
    spec = random_spec("llama3-8b", BaseModelId("b"))
    assert decode_stages(spec, 2) == (17, 15)
    assert decode_stages(spec, 1) == (32,)
    assert sum(decode_stages(spec, 4)) == 32
    small = random_spec("qwen2.5-0.5b", BaseModelId("b"))
    assert decode_stages(small, 2)[1] < 12
