"""A controller that dies anywhere between its writes and its commands: the next one brings the machines to the plan."""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from loraplex.controller.catalog_thread import CatalogThread
from loraplex.controller.fleet.state import adapter_keys
from loraplex.controller.fleet.store import Reason
from loraplex.core.control import ReplicaRoute
from loraplex.core.fleet import ReplicaTarget
from loraplex.core.ids import ReplicaId
from loraplex.core.plan import GroupPlan, Plan
from loraplex.testing.fake_actuator import FakeActuator

from tests.controller.fleet.world import A, B, C, Fleet, group, node, plan

NODES = (node("n1", 3), node("n2", 3))
CRASHES = 40
"""For each of five seeds."""


class Death:
    """Ends a controller at one of the points where it awaits the machines or the database. What it called at that
    moment may have happened or not; nothing that it does later reaches either."""

    def __init__(self) -> None:
        self.left: int | None = None
        self.struck = asyncio.Event()

    def strike_after(self, points: int) -> None:
        self.left, self.struck = points, asyncio.Event()

    async def point(self, name: str = "") -> None:
        if self.left is None:
            return
        self.left -= 1
        if self.left <= 0:
            self.struck.set()
            await asyncio.Event().wait()

    def wraps(self, write: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def written(catalog: CatalogThread, call: Any) -> Any:
            await self.point()
            result = await write(catalog, call)
            await self.point()
            return result

        return written


@pytest.mark.parametrize(
    ("new_database", "seed"),
    [
        ("sqlite", 0),
        *(pytest.param("sqlite", seed, marks=pytest.mark.slow) for seed in range(1, 5)),
        *(pytest.param("postgresql", seed, marks=pytest.mark.slow) for seed in range(2)),
    ],
    indirect=["new_database"],
)
async def test_every_crash_converges(
    tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    draw = random.Random(seed)
    death = Death()
    monkeypatch.setattr(CatalogThread, "write_session", death.wraps(CatalogThread.write_session))
    fleet = Fleet(tmp_path, FakeActuator(NODES, start_s=0.002), plan(0, group("x", A)), database_url=database_url)
    fleet.machines.hook = death.point
    await fleet.start()
    await fleet.register("p", "q", "r", "s")
    await fleet.settled()
    wanted = fleet.manager.plans.active.plan
    died = 0
    while died < CRASHES:
        death.strike_after(draw.randint(1, 60))
        applying = asyncio.create_task(_apply(fleet, made := _random_plan(draw)))
        if draw.random() < 0.3 and fleet.machines.up():
            fleet.machines.kill(draw.choice(sorted(fleet.machines.up())))
        settled = asyncio.create_task(_settled_on(fleet, made))
        struck = asyncio.create_task(death.struck.wait())
        await asyncio.wait([struck, settled], return_when=asyncio.FIRST_COMPLETED)
        applied = applying.done() and not applying.cancelled()
        for task in (settled, applying, struck):
            task.cancel()
        await asyncio.gather(settled, applying, struck, return_exceptions=True)
        death.left = None
        if not death.struck.is_set():
            wanted = made
            continue
        died += 1
        if draw.random() < 0.2 and fleet.machines.up():
            fleet.machines.kill(draw.choice(sorted(fleet.machines.up())))
        await fleet.controller.stop()
        await fleet.start()
        now = fleet.manager.plans.active.plan
        assert now.groups == made.groups or (now.groups == wanted.groups and not applied)
        wanted = now
        await fleet.settled(timeout_s=30)
        routes = await fleet.routes()
        assert routes.keys() == fleet.machines.up().keys()
        assert not any(route.draining for route in routes.values())
        for route in routes.values():
            assert adapter_keys(route.adapters) == adapter_keys(fleet.machines.resident(route.replica_id))
        assert _routed(routes.values(), with_nodes=None if _is_open(wanted) else fleet.machines.up()) == _expected(
            wanted
        )
    await fleet.controller.stop()


async def _apply(fleet: Fleet, made: Plan) -> None:
    await fleet.manager.plans.apply(made, source="admin", reason=Reason(text="test"), renumber=True)


async def _settled_on(fleet: Fleet, made: Plan) -> None:
    while not (fleet.manager.plans.active.plan.groups == made.groups and fleet.manager.status().settled):  # noqa: ASYNC110
        await asyncio.sleep(0.005)


def _random_plan(draw: random.Random) -> Plan:
    """Groups that the nodes can hold; half of the plans leave their places open."""
    groups: list[GroupPlan] = []
    placed = draw.random() < 0.5
    for one in NODES:
        left = one.num_gpus - draw.choice((0, 0, 0, 1))
        while left:
            tp = draw.choice((1, 2)) if left > 1 else 1
            bases = draw.choice(((A,), (A,), (B,), (C,), (A, B)))
            names = draw.sample(("p", "q", "r", "s"), draw.randint(0, 3))
            where = (one.name,) * tp if placed else ()
            groups.append(group(f"group-{len(groups)}", *bases, tp=tp, gpu="g", nodes=where, adapters=names))
            left -= tp
    draw.shuffle(groups)
    return plan(1, *groups)


def _expected(made: Plan) -> Counter[Any]:
    return Counter(
        (tuple(sorted((p.base_model_id, p.adapters) for p in one.bases)), one.shape, one.nodes) for one in made.groups
    )


def _is_open(made: Plan) -> bool:
    return not any(one.nodes for one in made.groups)


def _routed(routes: Iterable[ReplicaRoute], *, with_nodes: Mapping[ReplicaId, ReplicaTarget] | None) -> Counter[Any]:
    """As ``_expected``, of what gateways are told."""
    groups: dict[str, list[ReplicaRoute]] = {}
    for route in routes:
        groups.setdefault(route.group, []).append(route)
    return Counter(
        (
            tuple(sorted((route.base_model_id, route.adapters) for route in members)),
            members[0].shape,
            with_nodes[members[0].replica_id].nodes if with_nodes else (),
        )
        for members in groups.values()
    )
