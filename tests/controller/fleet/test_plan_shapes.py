"""Plans whose shapes a base cannot take are refused with one line, before anything starts."""

import pytest
from loraplex.controller.fleet.checks import check_plan
from loraplex.controller.fleet.gpus import GpuLedger
from loraplex.controller.fleet.state import FleetBase
from loraplex.core.errors import InvalidInput
from loraplex.core.fleet import NodeStatus
from loraplex.core.ids import BaseModelId
from loraplex.core.plan import BasePlacement, GroupPlan, Plan, Shape
from loraplex.model_runner.random_models import random_spec

B70 = BaseModelId("llama3-70b")
NODES = tuple(NodeStatus(name=f"n{index}", gpu="h100-80gb", num_gpus=8) for index in range(2))
BASE = FleetBase(base_model_id=B70, model=random_spec("llama3-70b", B70))
PACED = FleetBase(base_model_id=B70)


def check(shape: Shape, base: FleetBase = BASE, gpu: str = "h100-80gb") -> None:
    group = GroupPlan(name="g", shape=shape, gpu=gpu, bases=(BasePlacement(base_model_id=B70),))
    check_plan(Plan(version=1, groups=(group,)), NODES, {B70: base}, may_grow=False)


@pytest.mark.parametrize("shape", [Shape(tp=4), Shape(tp=8), Shape(tp=2, pp=2), Shape(pp=4)], ids=str)
def test_shapes_that_divide_the_base_and_hold_it(shape: Shape) -> None:
    check(shape)


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        (Shape(tp=3), "64 heads do not divide by 3"),
        (Shape(pp=81), "80 layers are too few"),
        (Shape(), "llama3-70b does not fit on tp 1 x pp 1 GPUs of type h100-80gb"),
    ],
)
def test_shapes_that_do_not(shape: Shape, why: str) -> None:
    with pytest.raises(InvalidInput, match=f"group g: .*{why}"):
        check(shape)


def test_what_is_not_known_is_not_judged() -> None:
    check(Shape(tp=3), PACED)
    check(Shape(), gpu="")


def test_a_stage_lies_on_one_node() -> None:
    small = GpuLedger(NodeStatus(name=f"n{index}", gpu="g", num_gpus=1 + index // 4) for index in range(6))
    assert small.fitting(gpu="", nodes=(), shape=Shape(pp=4), per_rank=1) == ("n0", "n1", "n2", "n3")
    assert small.fitting(gpu="", nodes=(), shape=Shape(tp=2, pp=2), per_rank=1) == ("n4", "n4", "n5", "n5")
    assert small.fitting(gpu="", nodes=(), shape=Shape(tp=4), per_rank=1) is None
    nodes = ("n0", "n1", "n0", "n1")
    group = GroupPlan(name="g", shape=Shape(tp=2, pp=2), nodes=nodes, bases=(BasePlacement(base_model_id=B70),))
    with pytest.raises(InvalidInput, match="group g: the 2 ranks of a stage must share a node"):
        check_plan(Plan(version=1, groups=(group,)), NODES, {B70: PACED}, may_grow=False)


def test_bases_that_fit_alone_and_not_together() -> None:
    names = [BaseModelId("one"), BaseModelId("other")]
    bases = {name: FleetBase(base_model_id=name, model=random_spec("llama3-70b", name)) for name in names}
    placed = tuple(BasePlacement(base_model_id=name) for name in names)

    def check_on(shape: Shape) -> None:
        group = GroupPlan(name="g", shape=shape, gpu="h100-80gb", bases=placed)
        check_plan(Plan(version=1, groups=(group,)), NODES, bases, may_grow=False)

    check_on(Shape(tp=8))
    with pytest.raises(InvalidInput, match="group g: one, other do not fit together on tp 4 x pp 1 GPUs of type"):
        check_on(Shape(tp=4))
