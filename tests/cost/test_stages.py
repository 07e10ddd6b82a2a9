"""Stage cuts: never a slower slowest stage than any other cut has."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex.core.errors import BadConfig
from loraplex.core.ids import BaseModelId
from loraplex.core.model import ModelSpec
from loraplex.cost.ceilings import ceilings_of
from loraplex.cost.roofline import decode_costs
from loraplex.cost.stages import LayerCosts, cut_stages, equal_stages, stage_layers, weight_costs
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
    priced = LayerCosts(layers=tuple(costs), first=first, last=last)
    assert cut == priced.cut(num_stages)
    assert priced.slowest(cut) == min(map(priced.slowest, others))


@pytest.mark.parametrize(("num_layers", "num_stages"), [(32, 1), (32, 2), (30, 4), (7, 3)])
def test_layers_that_cost_the_same_are_cut_evenly(num_layers: int, num_stages: int) -> None:
    cut = cut_stages([1.0] * num_layers, num_stages)
    assert cut == equal_stages(num_layers, num_stages)


def spec(name: str) -> ModelSpec:
    return random_spec(name, BaseModelId("b"))


def test_the_last_stage_of_a_large_vocabulary_has_fewer_layers() -> None:
    """Llama 3 8B: the head is 2.4 layers' worth of weights."""
    costs = weight_costs(spec("llama3-8b"))
    assert [stage_layers(spec("llama3-8b"), pp) for pp in (1, 2, 4)] == [(32,), (17, 15), (9, 9, 8, 6)]
    assert costs.last / costs.layers[0] == pytest.approx(2.41, abs=0.01)
    assert weight_costs(spec("qwen2.5-0.5b")).cut(2)[1] < 12


@pytest.mark.parametrize("name", ["llama3-8b", "llama3-70b", "qwen3-0.6b"])
@pytest.mark.parametrize("tp", [1, 2])
def test_the_roofline_s_cut_is_never_slower_than_the_equal_one(name: str, tp: int) -> None:
    model = spec(name)
    costs = decode_costs(model, ceilings_of("h100-80gb"), tp=tp)
    assert len(costs.layers) == model.num_layers
    for pp in (2, 4):
        assert costs.slowest(costs.cut(pp)) <= costs.slowest(equal_stages(model.num_layers, pp))
