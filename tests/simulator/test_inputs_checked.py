"""What is wrong with an input is told in one line that names the row, the group or the adapter."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from loraplex.core.errors import InvalidInput
from loraplex.core.ids import BaseModelId
from loraplex.core.plan import AdapterShare, BasePlacement, Plan, Shape
from loraplex.simulator.cluster import Cluster
from loraplex.simulator.exact import simulate_exact
from loraplex.simulator.fast import simulate
from loraplex.simulator.results import adapter_scores, tenant_scores
from loraplex.simulator.scenarios import LARGE, make_arrivals, make_input
from loraplex.simulator.types import Outcome, SimulationInput
from loraplex.simulator.workload import Workload


@pytest.fixture
def given() -> SimulationInput:
    return make_input(make_arrivals(num_requests=40, rate=10, num_adapters=5, num_tenants=2), num_groups=2)


def _with(given: SimulationInput, field: str, row: int, value: Any) -> SimulationInput:
    changed = getattr(given.arrivals, field).copy()
    changed[row] = value
    return dataclasses.replace(given, arrivals=dataclasses.replace(given.arrivals, **{field: changed}))


@pytest.mark.parametrize(
    ("field", "row", "value", "message"),
    [
        ("arrival_s", 3, np.nan, r"trace row 3: arrival_s is not a finite number \(nan\)"),
        ("arrival_s", 39, np.inf, "trace row 39: arrival_s is not a finite number"),
        ("arrival_s", 0, -1.0, "trace row 0: arrival_s is negative"),
        ("arrival_s", 20, 0.0, r"trace row 20: arrival_s is before the row above \(0.0\)"),
        ("adapter", 7, 5, r"trace row 7: adapter is not in the table \(5\)"),
        ("prompt_tokens", 8, -1, "trace row 8: prompt_tokens is below 1 or not given"),
        ("output_tokens", 9, 0, "trace row 9: output_tokens is below 1 or not given"),
    ],
)
def test_a_wrong_row_is_named(given: SimulationInput, field: str, row: int, value: Any, message: str) -> None:
    for simulator in (simulate, simulate_exact):
        with pytest.raises(InvalidInput, match=message):
            simulator(_with(given, field, row, value))


def test_an_empty_trace_is_refused(given: SimulationInput) -> None:
    names = ("arrival_s", "adapter", "base_model", "tenant", "prompt_tokens", "output_tokens")
    empty = dataclasses.replace(given.arrivals, **{name: getattr(given.arrivals, name)[:0] for name in names})
    with pytest.raises(InvalidInput, match="the trace has no requests"):
        simulate(dataclasses.replace(given, arrivals=empty))


def test_sizes_are_needed_for_all_adapters(given: SimulationInput) -> None:
    with pytest.raises(InvalidInput, match="the trace has 5 adapters, sizes are given for 4"):
        simulate(dataclasses.replace(given, adapters=given.adapters[:-1]))


def _planned(given: SimulationInput, **changes: Any) -> SimulationInput:
    group = dataclasses.replace(given.plan.groups[0], **changes)
    return dataclasses.replace(given, plan=Plan(version=1, groups=(group, *given.plan.groups[1:])))


def test_a_group_without_cost_or_room_is_named(given: SimulationInput) -> None:
    with pytest.raises(InvalidInput, match="group g0: no cost of llama3-8b on h100-80gb with tp 2, pp 1"):
        simulate(_planned(given, shape=Shape(tp=2)))
    with pytest.raises(InvalidInput, match="group g0: no cost of llama3-8b on a100 with tp 1, pp 1"):
        simulate(_planned(given, gpu="a100"))
    arrivals = make_arrivals(num_requests=5, rate=1, num_adapters=2, bases=(LARGE,))
    with pytest.raises(InvalidInput, match=r"group g0: llama3-70b does not fit \(\d+ bytes per GPU are missing\)"):
        simulate(make_input(arrivals, num_groups=1, bases=(LARGE,)))
    with pytest.raises(InvalidInput, match="the plan has no group with a base"):
        simulate(_planned(dataclasses.replace(given, plan=Plan(version=1, groups=given.plan.groups[:1])), bases=()))


def test_a_weight_must_be_positive(given: SimulationInput) -> None:
    share = AdapterShare(tenant="t0", name="a0", weight=0.0)
    placed = BasePlacement(base_model_id=BaseModelId("llama3-8b"), adapters=(share,))
    with pytest.raises(InvalidInput, match=r"adapter t0/a0: its weight 0\.0 is not above 0"):
        simulate(_planned(given, bases=(placed,)))


def test_requests_that_no_replica_can_hold_are_impossible_in_both(given: SimulationInput) -> None:
    given = _with(given, "prompt_tokens", 3, 10_000_000)
    arrivals = dataclasses.replace(given.arrivals, base_models=("llama3-8b", "elsewhere"))
    arrivals.base_model[5], arrivals.adapter[5] = 1, -1
    given = dataclasses.replace(given, arrivals=arrivals)
    for simulator in (simulate, simulate_exact):
        result = simulator(given)
        assert np.flatnonzero(result.outcome == Outcome.IMPOSSIBLE).tolist() == [3, 5]
        assert np.isinf(result.ttft_s[[3, 5]]).all()
        assert result.score.num_served == 38


def test_requests_without_a_base_get_the_plans_only_one(given: SimulationInput) -> None:
    arrivals = dataclasses.replace(
        given.arrivals,
        base_model=np.full(40, -1, dtype=np.int32),
        base_models=(),
        adapters=tuple(adapter._replace(base_model=None) for adapter in given.arrivals.adapters),
    )
    unsaid = dataclasses.replace(given, arrivals=arrivals)
    assert simulate(unsaid).score.num_served == 40
    two = make_input(given.arrivals, num_groups=1, bases=(BaseModelId("llama3-8b"), BaseModelId("other")))
    with pytest.raises(InvalidInput, match="trace row 0: no base is given, and the plan has 2"):
        simulate(dataclasses.replace(two, arrivals=arrivals))


def test_adapters_go_where_they_are_listed_and_others_anywhere() -> None:
    given = make_input(make_arrivals(num_requests=200, rate=60, num_adapters=12, num_tenants=2), num_groups=2)
    share = AdapterShare(tenant="t0", name="a0")
    placed = BasePlacement(base_model_id=BaseModelId("llama3-8b"), adapters=(share,))
    given = _planned(given, bases=(placed,))
    for simulator in (simulate, simulate_exact):
        result = simulator(given)
        assert set(result.group[given.arrivals.adapter == 0].tolist()) == {0}
        assert set(result.group[given.arrivals.adapter > 0].tolist()) == {0, 1}


def test_scores_count_the_scored_span_and_split_by_tenant_and_adapter(given: SimulationInput) -> None:
    times = given.arrivals.arrival_s
    given = dataclasses.replace(given, score_from_s=float(times[10]), score_until_s=float(times[30]))
    result = simulate(given)
    assert result.score.num_requests == 20
    assert result.score.goodput_per_s == pytest.approx(result.score.num_good / (times[30] - times[10]))
    cluster = Cluster.of(given, Workload.of(given.arrivals, given.adapters))
    for scores, attainment, names in (
        (tenant_scores(given, result, cluster), result.tenant_attainment, given.arrivals.tenants),
        (adapter_scores(given, result, cluster), result.adapter_attainment, [f"t{i % 2}/a{i}" for i in range(5)]),
    ):
        assert sum(score.num_requests for score in scores.values()) == 20
        assert sum(score.num_good for score in scores.values()) == result.score.num_good
        for name, share in zip(names, attainment, strict=True):
            assert np.isnan(share) if name not in scores else scores[name].attainment == share
