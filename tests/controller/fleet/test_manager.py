"""The fleet manager over machines in memory and a real database: plans come true, one step at a time."""

from collections.abc import Callable

from loraplex.controller.fleet.store import Reason

from tests.controller.fleet.world import A, Fleet, group, node, plan


async def test_the_config_is_the_plan_until_one_is_applied(make_fleet: Callable[..., Fleet]) -> None:
    fleet = make_fleet(node("n1", 2), default=plan(0, group("x", A), group("y", A)))
    manager = await fleet.start()
    await fleet.settled()
    assert fleet.shown() == [("a", 1, ("n1",), ()), ("a", 1, ("n1",), ())]
    await manager.plans.apply(plan(7, group("z", A, tp=2)), source="admin", reason=Reason(text="test"))
    await fleet.settled()
    assert fleet.shown() == [("a", 2, ("n1", "n1"), ())]
    await fleet.controller.stop()
    await fleet.start()
    await fleet.settled()
    assert fleet.shown() == [("a", 2, ("n1", "n1"), ())]
    assert fleet.manager.plans.active.plan.version == 7
