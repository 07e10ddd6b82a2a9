"""Which plan comes back: what is kept of the plans there were, and which was in force before."""

from collections.abc import Callable
from typing import Any

import pytest
from loraplex.controller.catalog_thread import CatalogThread
from loraplex.controller.config import ControllerOptions
from loraplex.controller.fleet import rows
from loraplex.controller.fleet.store import FleetStore, Reason
from loraplex.core.clock import SystemClock
from loraplex.core.errors import InvalidInput
from loraplex.core.rollout import PlanState

from tests.controller.fleet.world import A, group, plan

PLAN = plan(0, group("x", A))
BECAUSE = Reason(text="test")


@pytest.fixture
async def store(make_options: Callable[..., ControllerOptions], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(rows, "_KEPT_PLANS", 5)
    thread = CatalogThread(make_options(), SystemClock(), lambda version: None)
    catalog, _ = await thread.open()
    yield FleetStore(thread, SystemClock(), epoch=catalog.epoch)
    await thread.close()


async def _propose(store: FleetStore, count: int) -> None:
    for _ in range(count):
        await store.propose(PLAN, source="planner", reason=BECAUSE)


async def test_proposals_push_out_neither_the_plan_in_force_nor_the_one_before_it(store: FleetStore) -> None:
    for _ in range(2):
        await store.apply(PLAN, source="admin", reason=BECAUSE, renumber=True)
    await _propose(store, 12)
    active = (await store.load()).active
    assert active is not None
    assert active.plan.version == 2
    kept = [one.plan.version for one in await store.plans(100)]
    assert kept == [14, 13, 12, 11, 10, 2, 1]
    assert await store.fail(2, "cannot start") == 1


async def test_a_version_that_jumps_pushes_nothing_out(store: FleetStore) -> None:
    for version in (1, 20_260_101):
        await store.apply(plan(version, group("x", A)), source="admin", reason=BECAUSE, renumber=False)
    assert await store.fail(20_260_101, "cannot start") == 1


async def test_a_version_leaves_room_for_those_after_it(store: FleetStore) -> None:
    with pytest.raises(InvalidInput, match="above 2,000,000,000"):
        await store.apply(plan(2_000_000_001, group("x", A)), source="admin", reason=BECAUSE, renumber=False)
    await store.apply(plan(2_000_000_000, group("x", A)), source="admin", reason=BECAUSE, renumber=False)
    assert (await store.apply(PLAN, source="admin", reason=BECAUSE, renumber=True)).plan.version == 2_000_000_001


async def test_before_a_plan_was_what_was_in_force_not_what_was_proposed(store: FleetStore) -> None:
    await store.apply(PLAN, source="admin", reason=BECAUSE, renumber=True)
    await _propose(store, 2)
    await store.accept(3)
    before = await store.before(3)
    assert before is not None
    assert (before.plan.version, before.state) == (1, PlanState.REPLACED)
    assert await store.before(1) is None
    # A proposal may be taken after a plan with a higher number.
    await _propose(store, 1)
    await store.apply(PLAN, source="admin", reason=BECAUSE, renumber=True)
    await store.accept(4)
    later = await store.before(4)
    assert later is not None
    assert later.plan.version == 5


async def test_those_that_failed_are_passed_over(store: FleetStore) -> None:
    for _ in range(3):
        await store.apply(PLAN, source="admin", reason=BECAUSE, renumber=True)
    assert await store.fail(3, "cannot start") == 2
    assert await store.fail(2, "cannot start") == 1
    await _propose(store, 12)
    assert await store.fail(1, "cannot start") == 0
    assert (await store.load()).active is None


async def test_without_its_row_the_plan_in_force_is_the_configs(store: FleetStore, caplog: Any) -> None:
    await store.apply(PLAN, source="admin", reason=BECAUSE, renumber=True)
    await store._transactions.write_session(lambda session: session.delete(session.get(rows.PlanRow, 1)))
    assert (await store.load()).active is None
    assert "plan 1 is in force but not in the database" in caplog.text
