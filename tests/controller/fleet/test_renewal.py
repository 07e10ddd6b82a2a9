"""Replicas of another release are replaced one at a time, and bases go on serving where that can be."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex.controller.fleet.diff import Decided, decide
from loraplex.controller.fleet.placing import Placer
from loraplex.controller.fleet.state import Replica, ReplicaState, outdated_groups
from loraplex.core.fleet import ReplicaTarget
from loraplex.core.ids import BaseModelId
from loraplex.core.plan import GroupPlan

from tests.controller.fleet import world
from tests.controller.fleet.machines import MAX_TURNS, Machines
from tests.controller.fleet.world import A, B, Fleet, group, node, plan

Make = Callable[..., Fleet]
NEW = {base: replace(known, release="new") for base, known in world.BASES.items()}


class Releases(Machines):
    """What is started from now on is of the new release."""

    def upgrade(self) -> None:
        self.placer = Placer(NEW)
        self.bases = NEW

    bases = world.BASES

    def decide(self, plan: list[GroupPlan], extra: Any = (), **more: Any) -> Decided:
        observed = self.observed(**more)
        return decide(self.placer.place(plan, extra, observed.replicas, observed.nodes), observed, self.bases)

    def _start(self, action: Any, base: BaseModelId, name: str) -> None:
        before = set(self.replicas)
        super()._start(action, base, name)
        for replica_id in self.replicas.keys() - before:
            self.replicas[replica_id] = replace(self.replicas[replica_id], release=self.bases[base].release)

    def outdated(self) -> frozenset[str]:
        return outdated_groups(self.replicas.values(), self.bases)

    def leaving(self) -> list[Replica]:
        return [r for r in self.replicas.values() if r.state in (ReplicaState.DRAINING, ReplicaState.STOPPING)]


def rolled(machines: Releases, wanted: list[GroupPlan], choose: Any) -> list[Counter[BaseModelId]]:
    """What served after each turn, until everything is of the new release; one group at a time is between two."""
    seen = []
    for _ in range(MAX_TURNS):
        decided = machines.decide(wanted)
        machines.act(decided)
        seen.append(machines.serving())
        between = {r.target.group for r in machines.replicas.values() if r.state is ReplicaState.STARTING}
        assert len(between) <= 1
        if decided.settled and not decided.actions and not machines.outdated():
            return seen
        machines.advance(choose)
    raise AssertionError("it does not end")


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    num_groups=st.integers(1, 5),
    two_bases=st.booleans(),
    data=st.data(),
)
def test_every_group_is_renewed_one_at_a_time_and_bases_go_on_serving(
    sizes: list[int], num_groups: int, two_bases: bool, data: st.DataObject
) -> None:
    machines = Releases(*(node(f"n{index}", size) for index, size in enumerate(sizes)))
    num_groups = min(num_groups, sum(sizes))
    wanted = [group(f"x{i}", B if two_bases and i % 2 else A) for i in range(num_groups)]

    def choose(busy: list[Replica]) -> Replica:
        return data.draw(st.sampled_from(busy))

    machines.reach(wanted, choose)
    machines.upgrade()
    before = machines.serving()
    room = sum(sizes) - num_groups
    for serving in rolled(machines, wanted, choose):
        for base, count in before.items():
            if room:
                assert serving[base] >= count, "there is room for the successor first"
            else:
                assert serving[base] >= count - 1
    assert machines.serving() == before


def test_a_single_replica_on_a_full_node_makes_room_for_its_successor() -> None:
    machines = Releases(node("n", 1))
    machines.reach([group("x", A)], lambda busy: busy[0])
    machines.upgrade()
    seen = rolled(machines, [group("x", A)], lambda busy: busy[0])
    assert min(serving[A] for serving in seen) == 0
    assert machines.serving() == {A: 1}


def test_what_drains_for_its_release_is_not_taken_back() -> None:
    machines = Releases(node("n", 2))
    wanted = [group("x", A), group("y", A)]
    machines.reach(wanted, lambda busy: busy[0])
    machines.upgrade()
    machines.act(machines.decide(wanted))
    assert len(machines.leaving()) == 1
    machines.act(machines.decide(wanted))
    assert len(machines.leaving()) == 1


async def test_a_controller_of_a_new_release_replaces_what_it_adopts(
    make_fleet: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = make_fleet(node("n1", 3), default=plan(0, group("x", A), group("y", A)))
    await fleet.start()
    await fleet.settled()
    old = fleet.machines.up().keys()
    await fleet.controller.stop()
    monkeypatch.setattr(world, "BASES", NEW)
    await fleet.start()
    assert fleet.manager.status().num_outdated == 2
    await fleet.eventually(lambda: fleet.manager.status().num_outdated == 0 and fleet.manager.status().settled)
    assert not old & fleet.machines.up().keys()
    assert fleet.machines.num_serving(A) == 2
    renewed = fleet.machines.up().keys()
    await fleet.controller.stop()
    await fleet.start()
    await fleet.settled()
    assert fleet.machines.up().keys() == renewed, "its own release is not replaced"


async def test_a_release_that_cannot_be_loaded_stops_at_the_first_replica(
    make_fleet: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = make_fleet(node("n1", 4), default=plan(0, group("x", A), group("y", A)))
    await fleet.start()
    await fleet.settled()
    old = set(fleet.machines.up())
    await fleet.controller.stop()
    monkeypatch.setattr(world, "BASES", NEW)

    def why(target: ReplicaTarget) -> str | None:
        return None if target.replica_id in old else "weights do not fit"

    fleet.machines.cannot_load = why
    await fleet.start()
    await fleet.eventually(lambda: fleet.manager.failures())
    assert "weights do not fit" in str(fleet.manager.failures())
    assert set(fleet.machines.up()) == old
    assert fleet.machines.num_serving(A) == 2
    fleet.machines.cannot_load = lambda target: None
    await fleet.eventually(lambda: fleet.manager.status().num_outdated == 0)
