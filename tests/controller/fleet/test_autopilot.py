"""Plans from traffic: what the planner says is applied, proposed or let be, and what came of it is measured."""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from loraplex.controller.fleet.autopilot import Autopilot
from loraplex.controller.fleet.config import FleetConfig, PlanningConfig
from loraplex.controller.fleet.meter import TrafficMeter
from loraplex.controller.fleet.replan import (
    Answer,
    Task,
    by_chance,
    problem_for,
    recent_arrivals,
    replan,
    simulated,
)
from loraplex.controller.fleet.store import Reason
from loraplex.core.clock import SystemClock
from loraplex.core.fleet import NodeStatus
from loraplex.core.ids import BaseModelId
from loraplex.core.plan import BasePlacement, GroupPlan, Plan, Shape
from loraplex.core.rollout import DecisionKind, PlanState
from loraplex.traces.config import TraceConfig
from loraplex.traces.row import ArrivalRow, TraceRow
from loraplex.traces.schema import encode_batch
from loraplex.traces.writer import TraceWriter

from tests.controller.fleet.world import A, Fleet, group, node, plan

PLANNING = PlanningConfig(profiles=("h100-80gb",), window_s=60.0, min_requests=10, rate_window_s=60.0)


class Clock(SystemClock):
    def __init__(self) -> None:
        self.ahead_s = 0.0

    def monotonic_s(self) -> float:
        return super().monotonic_s() + self.ahead_s


def _row(
    arrival_s: float, *, adapter: str | None = None, ttft_s: float = 0.1, base: str = A, status: int = 200
) -> TraceRow:
    return TraceRow(
        arrival_s=arrival_s,
        tenant="acme",
        request_id="r",
        endpoint="chat",
        base_model_id=base,
        adapter_name=adapter,
        adapter_version=1 if adapter else None,
        adapter_digest="d" if adapter else None,
        prompt_tokens=200,
        cached_tokens=0,
        output_tokens=20,
        ttft_s=ttft_s,
        e2e_s=ttft_s + 0.2,
        tpot_s=0.01,
        status=status,
        finish_reason="stop",
        replica_id="x",
        priority="online",
        stream=True,
    )


def _arrival(row: TraceRow) -> ArrivalRow:
    return ArrivalRow(**{name: getattr(row, name) for name in ArrivalRow.__dataclass_fields__})


def _batch(rows: list[TraceRow], sequence: int = 0) -> bytes:
    return encode_batch(rows, arrivals=[_arrival(row) for row in rows], source="test", sequence=sequence)


async def _autopilot(
    fleet: Fleet, planner: Callable[[Task], Awaitable[Answer]], *, mode: str
) -> tuple[Autopilot, TrafficMeter, Clock]:
    await fleet.start()
    await fleet.settled()
    clock = Clock()
    meter = TrafficMeter(clock, ttft_s=0.5, tpot_s=0.05, window_s=60.0)
    autopilot = Autopilot(
        fleet.manager,
        fleet.manager.plans.store,
        meter,
        config=FleetConfig(mode=mode, planning=PLANNING),  # type: ignore[arg-type]
        trace_url=lambda: "/traces",
        unwritten=lambda since_s: b"",
        lora_ranks=dict,
        bases=(A,),
        clock=clock,
        planner=planner,
    )
    return autopilot, meter, clock


async def test_a_better_plan_is_applied_and_its_gain_measured(make_fleet: Callable[..., Fleet]) -> None:
    fleet = make_fleet(node("n1", 2), default=plan(0, group("x", A)))
    tasks: list[Task] = []

    async def planner(task: Task) -> Answer:
        tasks.append(task)
        better = plan(1, group("x", A), group("y", A))
        return Answer(plan=better, reason="two are faster", attainment=0.95, attainment_now=0.6)

    autopilot, meter, clock = await _autopilot(fleet, planner, mode="auto")
    meter.add(_batch([_row(0.0, ttft_s=0.1), _row(0.0, ttft_s=2.0)]))
    await autopilot.plan()
    assert tasks[0].current.groups == (group("x", A),)
    assert [(one.name, one.num_gpus) for one in tasks[0].nodes] == [("n1", 2)]
    await fleet.settled()
    assert fleet.machines.num_serving(A) == 2
    assert fleet.manager.plans.active.source == "planner"
    clock.ahead_s = 61.0
    meter.add(_batch([_row(0.0)] * 9 + [_row(0.0, ttft_s=2.0)], sequence=1))
    await autopilot.measure()
    applied = next(one for one in await fleet.manager.plans.decisions(10) if one.kind is DecisionKind.APPLIED)
    assert applied.reason == "two are faster"
    assert applied.attainment_before == 0.5
    assert applied.predicted_gain == pytest.approx(0.35)
    assert applied.attainment_after == 0.9


async def test_a_proposal_waits_for_an_administrator(make_fleet: Callable[..., Fleet]) -> None:
    fleet = make_fleet(node("n1", 2), default=plan(0, group("x", A)))

    async def planner(task: Task) -> Answer:
        return Answer(plan=plan(1, group("x", A), group("y", A)), reason="better", attainment=1.0, attainment_now=0.5)

    autopilot, _, _ = await _autopilot(fleet, planner, mode="propose")
    await autopilot.plan()
    await autopilot.plan()
    plans = fleet.manager.plans
    assert [(one.plan.version, one.state) for one in await plans.history(5)] == [
        (2, PlanState.PROPOSED),
        (1, PlanState.REPLACED),
    ]
    assert plans.active.plan.version == 0
    assert (await plans.accept(2)).state is PlanState.APPLYING
    await fleet.settled()
    assert fleet.machines.num_serving(A) == 2


async def test_what_is_not_better_is_recorded_and_let_be(make_fleet: Callable[..., Fleet]) -> None:
    fleet = make_fleet(node("n1", 2), default=plan(0, group("x", A)))

    async def planner(task: Task) -> Answer:
        return Answer(plan=None, reason="no other plan is better", attainment=0.9, attainment_now=0.9)

    autopilot, _, _ = await _autopilot(fleet, planner, mode="auto")
    await autopilot.plan()
    (decision,) = await fleet.manager.plans.decisions(10)
    assert (decision.kind, decision.reason) == (DecisionKind.KEPT, "no other plan is better")


async def test_adapters_move_with_their_rates_and_no_replica_restarts(make_fleet: Callable[..., Fleet]) -> None:
    fleet = make_fleet(node("n1", 2), default=plan(0, group("x", A, adapters="p"), group("y", A, adapters="q")))

    async def planner(task: Task) -> Answer:
        assert task.instead is not None, "no other plan is to be made"
        at = [[share.name for share in made.bases[0].adapters] for made in (*task.current.groups, *task.instead.groups)]
        assert at == [["p"], ["q"], ["p"], ["q", "p"]]
        return Answer(plan=None, reason="simulated", attainment=0.9, attainment_now=0.7)

    autopilot, meter, clock = await _autopilot(fleet, planner, mode="auto")
    await fleet.register("p", "q")
    await fleet.eventually(lambda: len([n for *_, names in fleet.shown() for n in names]) == 2)
    await fleet.settled()
    up = set(fleet.machines.up())
    meter.add(_batch([_row(0.0, adapter="p")] * 100))
    meter.add(_batch([_row(0.0, adapter="p")] * 100))
    assert meter.num_requests(60.0) == 100, "a repeat counts once"
    await autopilot.reassign()
    await fleet.eventually(lambda: [names for *_, names in fleet.shown()] == [("p",), ("p", "q")])
    assert set(fleet.machines.up()) == up
    decision = (await fleet.manager.plans.decisions(1))[0]
    assert decision.kind is DecisionKind.REASSIGNED
    assert "acme/p spreads from x to y" in decision.reason
    assert decision.predicted_gain is None
    await autopilot.predict()
    await autopilot.predict()
    assert (await fleet.manager.plans.decisions(1))[0].predicted_gain == pytest.approx(0.2)
    clock.ahead_s = 61.0
    meter.add(_batch([_row(0.0)], sequence=1))
    await autopilot.measure()
    assert (await fleet.manager.plans.decisions(1))[0].attainment_after == 1.0


async def test_what_an_administrator_applies_has_its_gain_predicted_too(make_fleet: Callable[..., Fleet]) -> None:
    fleet = make_fleet(node("n1", 2), default=plan(0, group("x", A)))
    asked: list[Task] = []

    async def planner(task: Task) -> Answer:
        asked.append(task)
        return Answer(plan=None, reason="simulated", attainment=0.5, attainment_now=0.8)

    autopilot, _, _ = await _autopilot(fleet, planner, mode="off")
    plans = fleet.manager.plans
    for made in (plan(1, group("x", A)), plan(2, group("x", A), group("y", A))):
        await plans.apply(made, source="admin", reason=Reason(text="an administrator applied it"))
        await fleet.settled()
        await autopilot.predict()
    await autopilot.predict()
    (task,) = asked
    assert (task.current, task.instead) == (plan(1, group("x", A)), plan(2, group("x", A), group("y", A)))
    settled, applied, *_ = await plans.decisions(9)
    assert (applied.kind, applied.predicted_gain) == (DecisionKind.APPLIED, pytest.approx(-0.3))
    assert (settled.kind, settled.predicted_gain) == (DecisionKind.SETTLED, None)


def test_the_meter_forgets_and_leaves_out_what_clients_did_wrong() -> None:
    clock = Clock()
    meter = TrafficMeter(clock, ttft_s=0.5, tpot_s=0.05, window_s=60.0)
    assert meter.attainment(60.0) is None
    meter.add(_batch([_row(0.0), _row(0.0, status=400), _row(0.0, status=429), _row(0.0, status=503)]))
    assert meter.attainment(60.0) == pytest.approx(1 / 3)
    over_quota = encode_batch([replace(_row(0.0, status=429), prompt_tokens=0)], source="quota", sequence=0)
    meter.add(over_quota)
    assert meter.attainment(60.0) == pytest.approx(1 / 3)
    clock.ahead_s = 30.0
    meter.add(_batch([_row(0.0, adapter="p")], sequence=1))
    assert meter.attainment(10.0) == 1.0
    assert meter.rates(10.0) == {(A, "acme", "p"): 0.1}
    waiting = [_arrival(_row(1.0, adapter="p")), _arrival(_row(2.0, adapter="q"))]
    meter.add(encode_batch([], arrivals=waiting, source="test", sequence=2))
    assert meter.rates(10.0) == {(A, "acme", "p"): 0.2, (A, "acme", "q"): 0.1}
    assert meter.attainment(10.0) == 1.0, "what has not ended is not judged"
    meter.add(encode_batch([_row(1.0, adapter="p")], source="test", sequence=3))
    assert meter.rates(10.0) == {(A, "acme", "p"): 0.2, (A, "acme", "q"): 0.1}, "its end is not another arrival"
    clock.ahead_s = 200.0
    assert meter.num_requests(60.0) == 0


def test_clients_that_go_are_judged_by_what_they_had() -> None:
    def attained(**changes: object) -> float | None:
        meter = TrafficMeter(SystemClock(), ttft_s=0.5, tpot_s=0.05, window_s=60.0)
        meter.add(_batch([replace(_row(0.0, status=499), **changes)]))  # type: ignore[arg-type]
        return meter.attainment(60.0)

    assert attained() == 1.0
    assert attained(ttft_s=0.6) == 0.0
    assert attained(tpot_s=0.06) == 0.0
    assert attained(ttft_s=None, tpot_s=None, e2e_s=0.6) == 0.0, "it waited in vain"
    assert attained(ttft_s=None, tpot_s=None, e2e_s=0.4) is None, "it did not wait"


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a first run compiles the simulator
async def test_the_real_planner_on_recorded_traffic(tmp_path: Path) -> None:
    """In its process, from the files that the controller's writer makes."""
    now_s = SystemClock().wall_s()
    writer = TraceWriter(TraceConfig(write_interval_s=0.1), str(tmp_path))
    base = "llama3-8b"
    old = [_row(now_s - 5000 + i, adapter=f"old-{i}", base=base) for i in range(50)]
    new = [_row(now_s - 50 + i * 0.004, adapter=f"a-{i % 7}", base=base) for i in range(4000)]
    stranger = [_row(now_s - 10, base="of-another-time")]
    writer.append(_batch([*old, *new, *stranger]))
    writer.close()
    one = GroupPlan(name="x", shape=Shape(), bases=(BasePlacement(base_model_id=BaseModelId(base)),))
    task = Task(
        trace_url=str(tmp_path),
        since_s=now_s - 100,
        nodes=(NodeStatus(name="n1", gpu="h100-80gb", num_gpus=2),),
        current=Plan(version=3, groups=(one,)),
        config=PlanningConfig(
            profiles=("h100-80gb",),
            min_requests=100,
            max_evaluations=10,
            max_search_s=10,
            ttft_s=0.05,
            tpot_s=0.02,
            window_s=100,
        ),
        bases=(base,),
        lora_ranks={f"acme/a-{i}": 16 for i in range(7)},
    )
    answer = await replan(task)
    assert answer.attainment_now is not None, answer.reason
    assert answer.plan is not None, answer.reason
    assert sum(made.shape.num_ranks for made in answer.plan.groups) == 2
    assert answer.gain is not None
    assert answer.gain > 0
    problem = problem_for(task, recent_arrivals(task))
    assert problem.turn_s == task.config.turn_s > 0
    current, _ = simulated(task.current, problem)
    assert not by_chance(current, answer.plan, problem)
    assert by_chance(answer.plan, answer.plan, problem)
    won = await replan(replace(task, instead=answer.plan))
    assert won.plan is None
    assert won.gain is not None
    assert won.gain > 0
    few = Task(**{name: getattr(task, name) for name in task.__dataclass_fields__} | {"since_s": now_s + 10})
    assert (await replan(few)).reason == "no traffic was recorded"
