"""With batch and output length 1 and no KV both simulators keep AlpaServe's contract."""

import dataclasses

import numpy as np
import pytest
from loraplex.core.errors import InvalidInput
from loraplex.core.ids import BaseModelId
from loraplex.core.model import ModelSpec
from loraplex.core.plan import BasePlacement, GroupPlan, Plan, Shape
from loraplex.cost.loads import Hop, LoadRates
from loraplex.cost.memory import MemoryModel
from loraplex.cost.step_cost import StepCoefficients, StepCost
from loraplex.simulator import alpaserve
from loraplex.simulator.alpaserve import Group, Work
from loraplex.simulator.alpaserve_cases import Case
from loraplex.simulator.exact import simulate_exact
from loraplex.simulator.fast import simulate
from loraplex.simulator.types import CostKey, Outcome, ReplicaCost, Serving, SimulationInput, Slo
from loraplex.testing.fake_executor import fake_model
from loraplex.traces.arrivals import Arrivals

_HOP = Hop(latency_s=0.0, bytes_per_s=1e9)


def _cost(model: ModelSpec, stage_s: tuple[float, ...]) -> ReplicaCost:
    memory = MemoryModel(
        gpu_bytes=1 << 40, weight_bytes=1, activation_bytes=0, kv_bytes_per_token=1, adapter_bytes_per_rank={}
    )
    step = StepCoefficients(fixed_s=1.0)
    return ReplicaCost(
        model=model,
        step=StepCost(interval=step, latency=step),
        memory=memory,
        loads=LoadRates(store=_HOP, disk=_HOP, host=_HOP),
        stage_s=stage_s,
    )


def _input(case: Case, work: Work, groups: tuple[Group, ...]) -> SimulationInput:
    """Models are bases, groups are groups; a GPU type of its own for each operator degree."""
    bases = [BaseModelId(name) for name in case.model_names]
    costs, planned = {}, []
    for index, group in enumerate(groups):
        shape, gpu = Shape(tp=group.layout.dp * group.layout.op, pp=group.layout.pp), f"op{group.layout.op}"
        for model in group.models:
            profile = case.profiles[work.model_types[model], group.layout]
            key = CostKey(gpu=gpu, base_model_id=bases[model], shape=shape)
            costs[key] = _cost(fake_model(base_model_id=bases[model]), tuple(profile.seconds().tolist()))
        placed = tuple(BasePlacement(base_model_id=bases[model]) for model in dict.fromkeys(group.models))
        planned.append(GroupPlan(name=f"g{index}", shape=shape, gpu=gpu, bases=placed))
    count = len(work.arrival_s)
    ones, none = np.ones(count, dtype=np.int32), np.full(count, -1, dtype=np.int32)
    return SimulationInput(
        plan=Plan(version=1, groups=tuple(planned)),
        arrivals=Arrivals(
            origin_s=0.0,
            arrival_s=work.arrival_s,
            adapter=none,
            base_model=work.model,
            tenant=none,
            prompt_tokens=ones,
            output_tokens=ones,
            adapters=(),
            base_models=tuple(bases),
            tenants=(),
        ),
        adapters=(),
        costs=costs,
        slo=Slo(),
        slo_of_base={base: Slo(ttft_s=slo_s) for base, slo_s in zip(bases, case.slo_s, strict=True)},
        serving=Serving.UNBATCHED,
        overhead_s=alpaserve.OVERHEAD_S,
    )


def _goodput(work: Work, served: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> float:
    return alpaserve.goodput(work, served)


def test_the_fast_one_gives_every_recorded_goodput(cases: dict[str, Case]) -> None:
    compared = 0
    for case in cases.values():
        work = case.test_work()
        for policy, recorded in case.policies.items():
            if not recorded.placement.start_s:
                result = simulate(_input(case, work, recorded.placement.groups[0]))
                assert _goodput(work, result.outcome == Outcome.SERVED) == recorded.goodput, (case.name, policy)
                compared += 1
    assert compared == 114


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("early13b_m8_g8_r20", "sr-greedy"),
        ("early13b_m8_g8_r40", "mp-search"),
        ("bert42_g24_r32_cv4_slo5", "mp-search"),
        ("mix60_g32_r16_cv4_slo5", "mp-greedy-4"),
    ],
)
def test_the_exact_one_runs_it_through_engines(cases: dict[str, Case], name: str, policy: str) -> None:
    case = cases[name]
    work, recorded = case.test_work(), case.policies[policy]
    given = _input(case, work, recorded.placement.groups[0])
    theirs, ours = simulate_exact(given), simulate(given)
    assert _goodput(work, theirs.outcome == Outcome.SERVED) == recorded.goodput
    assert np.array_equal(theirs.ttft_s, ours.ttft_s)
    assert np.array_equal(theirs.group, ours.group)
    served = ours.outcome == Outcome.SERVED
    slo_s = np.array(case.slo_s)[work.model]
    assert (ours.ttft_s[served] <= slo_s[served] + 1e-9).all()


def test_stage_times_are_needed(cases: dict[str, Case]) -> None:
    case = cases["early13b_m8_g8_r20"]
    work = case.test_work()
    given = _input(case, work, case.policies["sr-greedy"].placement.groups[0])
    without = {key: dataclasses.replace(cost, stage_s=()) for key, cost in given.costs.items()}
    with pytest.raises(InvalidInput, match=r"g0/m.: unbatched serving needs a time for each of 1 stages, not 0"):
        simulate(dataclasses.replace(given, costs=without))
