"""A fleet whose controllers are stopped at the end."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from loraplex.core.fleet import NodeStatus
from loraplex.core.plan import Plan
from loraplex.testing.fake_actuator import FakeActuator

from tests.controller.fleet.world import QUICK, Fleet, changed


@pytest.fixture
async def make_fleet(tmp_path: Path, database_url: str) -> AsyncIterator[Callable[..., Fleet]]:
    made: list[Fleet] = []

    def make(*nodes: NodeStatus, default: Plan, start_s: float = 0.0, **changes: object) -> Fleet:
        fleet = Fleet(
            tmp_path / "data",
            FakeActuator(nodes, start_s=start_s),
            default,
            changed(QUICK, changes),
            database_url=database_url,
        )
        made.append(fleet)
        return fleet

    yield make
    for fleet in made:
        if hasattr(fleet, "controller"):
            await fleet.controller.stop()
