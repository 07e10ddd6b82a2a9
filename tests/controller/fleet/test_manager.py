"""The fleet manager over machines in memory and a real database: plans come true, and what goes wrong has an answer."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from loraplex.controller.catalog_thread import CatalogThread
from loraplex.controller.fleet.store import Reason
from loraplex.core.errors import Conflict, InvalidInput, NotFound, Unavailable
from loraplex.core.fleet import ReplicaTarget
from loraplex.core.ids import TenantName
from loraplex.core.plan import Plan
from loraplex.core.rollout import DecisionKind, GroupState, PlanState

from tests.controller.fleet.world import A, B, C, Fleet, group, node, plan

Make = Callable[..., Fleet]


async def _apply(fleet: Fleet, made: Plan, *, renumber: bool = False) -> None:
    await fleet.manager.plans.apply(made, source="admin", reason=Reason(text="test"), renumber=renumber)


async def _reasons(fleet: Fleet, kind: DecisionKind) -> list[str]:
    return [one.reason for one in await fleet.manager.plans.decisions(100) if one.kind is kind]


async def test_the_config_is_the_plan_until_one_is_applied(make_fleet: Make) -> None:
    fleet = make_fleet(node("n1", 2), default=plan(0, group("x", A), group("y", A)))
    await fleet.start()
    await fleet.settled()
    assert fleet.shown() == [("a", 1, ("n1",), ()), ("a", 1, ("n1",), ())]
    await _apply(fleet, plan(7, group("z", A, tp=2)))
    await fleet.settled()
    assert fleet.shown() == [("a", 2, ("n1", "n1"), ())]
    await fleet.controller.stop()
    await fleet.start()
    await fleet.settled()
    assert fleet.shown() == [("a", 2, ("n1", "n1"), ())]
    assert fleet.manager.plans.active.plan.version == 7


async def test_a_restarted_controller_shows_the_routes_before_it_has_asked_the_machines(make_fleet: Make) -> None:
    fleet = make_fleet(node("n1", 2), default=plan(0, group("x", A), group("y", A)))
    await fleet.start()
    await fleet.settled()
    before = await fleet.routes()
    await fleet.controller.stop()
    stuck = asyncio.Event()

    async def hang(call: str) -> None:
        await stuck.wait()

    fleet.machines.hook = hang
    await fleet.start()
    assert await fleet.routes() == before
    stuck.set()
    await fleet.settled()
    assert await fleet.routes() == before
    assert sum(name == "start" for name, _ in fleet.machines.commands) == 4, "two started, two adopted"


async def test_requests_are_waited_for_before_a_replica_goes(make_fleet: Make) -> None:
    fleet = make_fleet(node("n1", 2), default=plan(0, group("x", A)), drain_timeout_s=60.0)
    await fleet.start()
    await fleet.settled()
    (old,) = fleet.machines.up()
    fleet.machines.set_load(old, 3)
    await _apply(fleet, plan(1, group("x", B)))
    await fleet.eventually(lambda: fleet.machines.num_serving(B) == 1)
    await asyncio.sleep(0.2)
    routes = await fleet.routes()
    assert routes[old].draining
    assert old in fleet.machines.up()
    fleet.machines.set_load(old, 0)
    await fleet.settled()
    assert old not in await fleet.routes()
    assert fleet.machines.num_serving(A) == 0


async def test_a_replica_that_never_gets_idle_has_its_time(make_fleet: Make) -> None:
    fleet = make_fleet(node("n1", 2), default=plan(0, group("x", A)), drain_timeout_s=0.2)
    await fleet.start()
    await fleet.settled()
    fleet.machines.set_load(next(iter(fleet.machines.up())), 3)
    await _apply(fleet, plan(1, group("x", B)))
    await fleet.settled()
    assert fleet.machines.num_serving(A) == 0


async def test_what_dies_comes_back_under_another_id(make_fleet: Make) -> None:
    fleet = make_fleet(node("n1", 1), default=plan(0, group("x", A)))
    await fleet.start()
    await fleet.settled()
    (old,) = fleet.machines.up()
    fleet.machines.kill(old, "out of memory")
    await fleet.eventually(lambda: fleet.machines.up().keys() not in ({old}, set()))
    await fleet.settled()
    assert (await fleet.routes()).keys() == fleet.machines.up().keys()
    assert await _reasons(fleet, DecisionKind.REPLACED_REPLICA) == [f"replica {old} is down: out of memory"]
    assert fleet.manager.failures() == {}


async def test_a_plan_that_cannot_be_loaded_gives_way_to_the_one_before(make_fleet: Make) -> None:
    fleet = make_fleet(node("n1", 2), default=plan(0, group("x", A), group("y", A)))
    await fleet.start()
    await fleet.settled()
    await _apply(fleet, plan(1, group("x", A), group("y", B)))
    await fleet.settled()

    def why(target: ReplicaTarget) -> str | None:
        return "weights do not fit" if target.shape.tp == 2 else None

    fleet.machines.cannot_load = why
    await _apply(fleet, plan(2, group("x", A, tp=2)))
    await fleet.eventually(lambda: fleet.manager.plans.active.plan.version == 1)
    await fleet.settled()
    assert fleet.machines.num_serving(A) == fleet.machines.num_serving(B) == 1
    failed = await fleet.manager.plans.record(2)
    assert failed.state is PlanState.FAILED
    assert failed.reason == "group x cannot be started: weights do not fit"
    assert sum("weights do not fit" in reason for reason in await _reasons(fleet, DecisionKind.FAILED)) == 1
    assert len(fleet.manager.failed_kinds) == 1


async def test_the_last_plan_left_is_tried_for_ever(make_fleet: Make) -> None:
    fleet = make_fleet(node("n1", 1), default=plan(0, group("x", A)))
    broken = True
    fleet.machines.cannot_load = lambda target: "the disk is away" if broken else None
    await fleet.start()
    await fleet.eventually(lambda: len(fleet.machines.used_ids) > 4)
    assert list(fleet.manager.failures().values()) == ["the disk is away"]
    shown = fleet.manager.status().groups[0]
    assert shown.state in (GroupState.WAITING, GroupState.STARTING)
    assert shown.reason == "the disk is away"
    broken = False
    await fleet.settled()
    assert fleet.manager.failures() == {}


async def test_plans_that_are_refused_change_nothing(make_fleet: Make) -> None:
    fleet = make_fleet(node("n1", 2), default=plan(0, group("x", A)))
    await fleet.start()
    await fleet.settled()
    await _apply(fleet, plan(3, group("x", A)))
    for bad, said in (
        (plan(4, group("x", A, nodes=["elsewhere"])), "this cluster has no node elsewhere"),
        (plan(4, group("x", A, gpu="h200")), "no GPU of type h200"),
        (plan(4, group("x", A, tp=4)), "needs 4 GPUs"),
    ):
        with pytest.raises(InvalidInput, match=said):
            await _apply(fleet, bad)
    for old in (3, 2):
        with pytest.raises(Conflict, match=f"plan version {old} is not above 3"):
            await _apply(fleet, plan(old, group("x", A)))
    with pytest.raises(NotFound):
        await fleet.manager.plans.rollback(17)
    assert fleet.manager.plans.active.plan.version == 3
    assert len(await fleet.manager.plans.history(10)) == 1


async def test_an_adapter_that_is_deleted_while_it_moves_is_passed_over(make_fleet: Make) -> None:
    fleet = make_fleet(node("n1", 2), default=plan(0, group("x", A), group("y", A)))
    await fleet.start()
    await fleet.register("p", "q")
    await fleet.settled()
    moving = asyncio.Event()
    release = asyncio.Event()

    async def slow(call: str) -> None:
        if call == "assign":
            moving.set()
            await release.wait()

    fleet.machines.hook = slow
    await _apply(fleet, plan(1, group("x", A, adapters="pq"), group("y", A, adapters="q")))
    await moving.wait()
    await fleet.controller.delete_adapter(TenantName("acme"), "q", None)
    release.set()
    await fleet.settled()
    assert [names for *_, names in fleet.shown()] == [(), ("p",)]
    fleet.machines.hook = _no_hook
    await fleet.register("p", "q")
    await fleet.eventually(lambda: [names for *_, names in fleet.shown()] == [("p", "q"), ("q",)])


async def test_an_adapter_that_cannot_be_loaded_ahead_is_routed_all_the_same(make_fleet: Make) -> None:
    fleet = make_fleet(node("n1", 1), default=plan(0, group("x", A)))
    await fleet.start()
    await fleet.register("p")
    await fleet.settled()
    fleet.machines.cannot_assign = lambda target: "the store is away"
    await _apply(fleet, plan(1, group("x", A, adapters="p")))
    await fleet.settled()
    (route,) = (await fleet.routes()).values()
    assert [share.name for share in route.adapters] == ["p"]
    assert ["the store is away" in reason for reason in await _reasons(fleet, DecisionKind.NOT_RESIDENT)] == [True]


async def test_a_node_that_leaves_and_flaps(make_fleet: Make) -> None:
    fleet = make_fleet(node("n1", 1), node("n2", 1), default=plan(0, group("x", A), group("y", B)))
    await fleet.start()
    await fleet.settled()
    fleet.machines.remove_node("n2")
    await fleet.eventually(lambda: GroupState.LEFT_OUT in [one.state for one in fleet.manager.status().groups])
    started = len(fleet.machines.used_ids)
    for _ in range(5):
        fleet.machines.add_node(node("n2", 1))
        await asyncio.sleep(0.02)
        fleet.machines.remove_node("n2")
        await asyncio.sleep(0.02)
    assert len(fleet.machines.used_ids) == started, "a node that does not stay is not used"
    fleet.machines.add_node(node("n2", 1))
    await fleet.eventually(lambda: len(fleet.machines.up()) == 2)
    await fleet.settled()


async def test_the_database_away_for_a_while(make_fleet: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = make_fleet(node("n1", 2), default=plan(0, group("x", A), group("y", B)))
    await fleet.start()
    await fleet.settled()
    write: Callable[..., Awaitable[Any]] = CatalogThread.write_session

    async def away(catalog: CatalogThread, call: Any) -> Any:
        raise Unavailable("the control database does not answer")

    monkeypatch.setattr(CatalogThread, "write_session", away)
    with pytest.raises(Unavailable):
        await _apply(fleet, plan(1, group("x", A)))
    victim = next(i for i, target in fleet.machines.up().items() if target.base_model_id == A)
    kept = await fleet.routes()
    fleet.machines.kill(victim)
    await fleet.eventually(lambda: fleet.manager.status().problem)
    assert fleet.manager.status().problem == "the control database does not answer"
    assert (await fleet.routes()).keys() == kept.keys() - {victim}, "the dead one is not routed, the others are"
    monkeypatch.setattr(CatalogThread, "write_session", write)
    await fleet.eventually(lambda: len(fleet.machines.up()) == 2)
    await fleet.settled()
    assert len(await _reasons(fleet, DecisionKind.REPLACED_REPLICA)) == 1


async def test_of_two_controllers_the_older_one_is_refused(make_fleet: Make) -> None:
    fleet = make_fleet(node("n1", 2), default=plan(0, group("x", A)))
    old = await fleet.start()
    old_controller = fleet.controller
    await fleet.settled()
    await fleet.start()
    await fleet.settled()
    with pytest.raises(Unavailable, match="newer controller") as caught:
        await old.plans.apply(plan(1, group("x", B)), source="admin", reason=Reason(text="test"))
    assert caught.value.code == "superseded"
    for call in (
        fleet.machines.stop(next(iter(fleet.machines.up())), epoch=old_controller.epoch),
        fleet.machines.assign(next(iter(fleet.machines.up().values())), epoch=old_controller.epoch),
    ):
        with pytest.raises(Unavailable) as caught:
            await call
        assert caught.value.code == "superseded"
    # A death makes the old one act as well; it finds out, and gives up.
    commands = len(fleet.machines.commands)
    fleet.machines.kill(next(iter(fleet.machines.up())))
    await fleet.eventually(lambda: "controller" in old.status().problem)
    await fleet.eventually(lambda: len(fleet.machines.up()) == 1)
    await fleet.settled()
    assert {name for name, _ in fleet.machines.commands[commands:]} == {"stop", "start"}
    assert len(fleet.machines.used_ids) == 2
    await old_controller.stop()


async def test_a_base_without_a_group_comes_when_it_is_asked_for_and_goes_when_nobody_does(make_fleet: Make) -> None:
    fleet = make_fleet(node("n1", 2), default=plan(0, group("x", A)), idle_s=1.5)
    await fleet.start()
    await fleet.settled()
    with pytest.raises(NotFound):
        await fleet.manager.plans.wake_base("nobody")  # type: ignore[arg-type]
    await fleet.manager.plans.wake_base(A)
    await fleet.manager.plans.wake_base(B)
    await fleet.eventually(lambda: fleet.machines.num_serving(B) == 1)
    awake = next(i for i, target in fleet.machines.up().items() if target.base_model_id == B)
    fleet.machines.set_load(awake, 1)
    await fleet.manager.plans.wake_base(C)
    await asyncio.sleep(2.0)
    assert fleet.machines.num_serving(B) == 1, "it is busy"
    assert fleet.machines.num_serving(C) == 0, "there is no GPU for it"
    await fleet.controller.stop()
    await fleet.start()
    await asyncio.sleep(0.1)
    assert awake in fleet.machines.up(), "a restarted controller does not forget it"
    fleet.machines.set_load(awake, 0)
    await fleet.eventually(lambda: fleet.machines.num_serving(B) == 0)
    assert len(await _reasons(fleet, DecisionKind.WOKEN)) == 2
    assert f"no request for {B} in 1.5 s" in await _reasons(fleet, DecisionKind.ASLEEP)


async def test_gateways_are_told_when_nothing_is_to_run_before_somebody_asks(make_fleet: Make) -> None:
    fleet = make_fleet(node("n1", 2), default=plan(0), idle_s=0.5)
    await fleet.start()
    assert (await fleet.snapshot()).asleep
    await fleet.manager.plans.wake_base(A)
    await fleet.eventually(lambda: fleet.machines.num_serving(A) == 1)
    await fleet.settled()
    assert not (await fleet.snapshot()).asleep
    await fleet.eventually(lambda: fleet.machines.num_serving(A) == 0)
    assert (await fleet.snapshot()).asleep


async def test_replicas_that_nobody_recorded_are_adopted(make_fleet: Make, new_database: Callable[[], str]) -> None:
    """As after the loss of the database."""
    fleet = make_fleet(node("n1", 2), default=plan(0, group("x", A), group("y", A)))
    await fleet.start()
    await fleet.settled()
    up = set(fleet.machines.up())
    await fleet.controller.stop()
    fleet.database_url = new_database()
    fleet.machines.forget_epoch()
    await fleet.start()
    await fleet.settled()
    assert set(fleet.machines.up()) == up
    fleet.machines.kill(next(iter(up)))
    await fleet.eventually(lambda: len(fleet.machines.up()) == 2 and set(fleet.machines.up()) != up)


async def _no_hook(call: str) -> None: ...
