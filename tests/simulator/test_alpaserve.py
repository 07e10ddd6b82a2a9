"""AlpaServe's contract: recorded goodputs come out exactly, and small cases by hand."""

import numpy as np
import pytest
from loraplex.cli.simulate_alpaserve import REPLANNED
from loraplex.core.errors import InvalidInput
from loraplex.simulator import alpaserve
from loraplex.simulator.alpaserve import OVERHEAD_S, Group, Layout, StageProfile, Work
from loraplex.simulator.alpaserve_cases import Case

ONE, TWO = Layout(1, 1, 1), Layout(1, 1, 2)
PROFILES = {
    ("m", ONE): StageProfile(latency_s=(1.0,), weight_gib=(4.0,)),
    ("m", TWO): StageProfile(latency_s=(0.5, 0.75), weight_gib=(2.0, 2.5)),
}
ONE_S = float(np.float32(1.0 * 1.009))


def _work(arrival_s: list[float], slo_s: float, model: list[int] | None = None, num_models: int = 1) -> Work:
    return Work(
        model_types=("m",) * num_models,
        slo_s=np.full(num_models, slo_s),
        arrival_s=np.array(arrival_s),
        model=np.array(model or [0] * len(arrival_s), dtype=np.int32),
    )


def _accepted(work: Work, *groups: Group) -> list[bool]:
    return alpaserve.simulate(work, groups, PROFILES).tolist()


def test_every_recorded_goodput_is_reproduced_exactly(cases: dict[str, Case]) -> None:
    compared = 0
    for case in cases.values():
        work = case.test_work()
        for policy, recorded in case.policies.items():
            if policy != REPLANNED:
                assert recorded.placement.goodput(work, case.profiles) == recorded.goodput, (case.name, policy)
                compared += 1
    assert compared == 114


def test_replanned_goodputs_differ_only_by_what_runs_at_the_changes(cases: dict[str, Case]) -> None:
    for case in cases.values():
        recorded = case.policies.get(REPLANNED)
        if recorded is not None and recorded.goodput is not None:
            assert abs(recorded.placement.goodput(case.test_work(), case.profiles) - recorded.goodput) < 5e-4


def test_a_late_request_is_dropped_and_leaves_the_clock_alone() -> None:
    no_wait = ONE_S + OVERHEAD_S + 1e-9
    assert _accepted(_work([0.0, 0.5, ONE_S], no_wait), Group(ONE, (0,))) == [True, False, True]


def test_stages_overlap_and_the_slowest_sets_the_pace() -> None:
    first, second = (float(s) for s in PROFILES["m", TWO].seconds())
    assert (first, second) == (float(np.float32(0.509)), float(np.float32(0.75 * 1.018)))
    third_ends = first + second + second + second + OVERHEAD_S
    assert _accepted(_work([0.0, 0.0, 0.0], third_ends + 1e-9), Group(TWO, (0,))) == [True, True, True]
    assert _accepted(_work([0.0, 0.0, 0.0], third_ends - 1e-9), Group(TWO, (0,))) == [True, True, False]


def test_the_group_that_is_free_first_is_chosen_and_the_first_of_equals() -> None:
    # Model 1 lies on the second group only: it is served at once only if model 0 went to the first.
    work = _work([0.0, 0.0], ONE_S + OVERHEAD_S, model=[0, 1], num_models=2)
    assert _accepted(work, Group(ONE, (0,)), Group(ONE, (0, 1))) == [True, True]
    assert _accepted(work, Group(ONE, (0, 1)), Group(ONE, (0,))) == [True, False]


def test_a_model_without_a_group_is_dropped() -> None:
    assert _accepted(_work([0.0, 1.0], 9.0, model=[0, 1], num_models=2), Group(ONE, (0,))) == [True, False]


def test_a_layout_without_a_profile_is_named() -> None:
    with pytest.raises(InvalidInput, match="no profile of m with dp 1, op 2, pp 1"):
        _accepted(_work([0.0], 9.0), Group(Layout(1, 2, 1), (0,)))


def test_requests_at_either_end_do_not_count() -> None:
    work = _work(list(np.linspace(0.0, 100.0, 1001)), 9.0)
    # int(10 / 100 * 1001) = 100 at either end.
    assert work.scored() == slice(100, 901)
    accepted = np.zeros(1001, dtype=np.bool_)
    accepted[100:500] = True
    assert alpaserve.goodput(work, accepted) == 400 / 801


def test_memory_is_the_sum_of_the_largest_stages() -> None:
    work = _work([0.0], 9.0, num_models=2)
    assert alpaserve.memory_gib(work, Group(TWO, (0, 1)), PROFILES) == 5.0


def test_recorded_placements_fit_their_budget_where_the_record_says_so(cases: dict[str, Case]) -> None:
    for case in cases.values():
        work = case.test_work()
        for recorded in case.policies.values():
            for groups in recorded.placement.groups:
                fullest = max(alpaserve.memory_gib(work, group, case.profiles) for group in groups)
                num_gpus = sum(group.layout.num_gpus for group in groups)
                assert (fullest <= case.memory_gib and num_gpus <= case.num_devices) is recorded.feasible
