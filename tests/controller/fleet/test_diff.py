"""Decisions alone: whatever runs and whatever is wanted, the actions lead there, within the GPUs, and harm little."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex.controller.fleet.diff import Assign, Decided, Drain, Observed, StartReplicas, Stop, TakeBack, decide
from loraplex.controller.fleet.placing import Placer
from loraplex.controller.fleet.state import Kind, Replica, ReplicaState, adapter_keys, running_groups
from loraplex.core.control import ReplicaRoute
from loraplex.core.fleet import NodeStatus, ReplicaTarget
from loraplex.core.ids import BaseModelId, ReplicaId
from loraplex.core.plan import GroupPlan

from tests.controller.fleet.world import BASES, A, B, C, group, node

MAX_TURNS = 200


class Machines:
    """Carries out actions; what takes time there ends when the test says so."""

    def __init__(self, *nodes: NodeStatus) -> None:
        self.nodes = nodes
        self.replicas: dict[ReplicaId, Replica] = {}
        self.count = 0
        self.placer = Placer(BASES)

    def decide(self, plan: list[GroupPlan], extra: Sequence[GroupPlan] = (), **more: Any) -> Decided:
        observed = self.observed(**more)
        return decide(self.placer.place(plan, extra, observed.replicas, observed.nodes), observed, BASES)

    def observed(self, **more: Any) -> Observed:
        drained = frozenset(i for i, r in self.replicas.items() if r.state is ReplicaState.DRAINING)
        return Observed(replicas=tuple(self.replicas.values()), nodes=self.nodes, drained=drained, **more)

    def act(self, decided: Decided) -> None:
        for action in decided.actions:
            match action:
                case StartReplicas():
                    self.count += 1
                    name = action.group or f"g{self.count}"
                    for base in action.bases:
                        self._start(action, base, name)
                case Assign():
                    self._put(action.replica_id, adapters=action.adapters)
                case Drain():
                    self._move(action.replica_ids, ReplicaState.DRAINING)
                case TakeBack():
                    self._move(action.replica_ids, ReplicaState.SERVING)
                case Stop():
                    self._move(action.replica_ids, ReplicaState.STOPPING)
        self.check_gpus()

    def _start(self, action: StartReplicas, base: BaseModelId, name: str) -> None:
        assert not action.group or all(
            r.target.base_model_id != base for r in self.replicas.values() if r.target.group == name
        ), "a group has one replica of a base"
        self.count += 1
        replica_id = ReplicaId(f"{base}-{self.count}")
        placed = next(one for one in action.plan.bases if one.base_model_id == base)
        self.replicas[replica_id] = Replica(
            target=ReplicaTarget(
                replica_id=replica_id,
                group=name,
                base_model_id=base,
                shape=action.plan.shape,
                gpu=action.plan.gpu,
                nodes=action.nodes,
                adapters=placed.adapters,
            ),
            state=ReplicaState.STARTING,
            since_s=0.0,
            group_bases=tuple(one.base_model_id for one in action.plan.bases),
            planned_nodes=action.planned_nodes,
        )

    def _put(self, replica_id: ReplicaId, **changes: Any) -> None:
        replica = self.replicas[replica_id]
        self.replicas[replica_id] = replace(replica, target=replace(replica.target, **changes))

    def _move(self, replica_ids: tuple[ReplicaId, ...], state: ReplicaState) -> None:
        for replica_id in replica_ids:
            self.replicas[replica_id] = replace(self.replicas[replica_id], state=state)

    def advance(self, choose: Any) -> None:
        """One of the things under way ends: a start, a stop, or a replica."""
        busy = [r for r in self.replicas.values() if r.state in (ReplicaState.STARTING, ReplicaState.STOPPING)]
        if not busy:
            return
        replica = choose(busy)
        if replica.state is ReplicaState.STOPPING:
            del self.replicas[replica.target.replica_id]
        else:
            route = ReplicaRoute(
                replica_id=replica.target.replica_id, base_model_id=replica.target.base_model_id, address="x:1"
            )
            self.replicas[replica.target.replica_id] = replace(replica, state=ReplicaState.SERVING, route=route)

    def kill(self, replica_id: ReplicaId) -> None:
        self._move((replica_id,), ReplicaState.STOPPING)

    def check_gpus(self) -> None:
        used = Counter(name for one in running_groups(self.replicas.values()) for name in one.nodes)
        for one in self.nodes:
            assert used[one.name] <= one.num_gpus, f"{one.name} gives more than it has"

    def serving(self) -> Counter[BaseModelId]:
        return Counter(r.target.base_model_id for r in self.replicas.values() if r.state is ReplicaState.SERVING)

    def reach(self, plan: list[GroupPlan], choose: Any) -> int:
        """Turns until all is as planned."""
        for turn in range(MAX_TURNS):
            decided = self.decide(plan)
            self.act(decided)
            if decided.settled:
                self.check_reached(plan)
                return turn
            self.advance(choose)
        pytest.fail(f"not there after {MAX_TURNS} turns: {decided.actions}, left out {decided.left_out}")

    def check_reached(self, plan: list[GroupPlan]) -> None:
        found = Counter(
            (one.shape, tuple(sorted((m.target.base_model_id, m.target.adapters) for m in one.members)))
            for one in running_groups(self.replicas.values())
        )
        assert found == Counter(
            (one.shape, tuple(sorted((p.base_model_id, p.adapters) for p in one.bases))) for one in plan
        )
        for one in plan:
            if one.nodes:
                assert any(
                    sorted(g.nodes) == sorted(one.nodes) and g.bases == Kind.of(one).bases
                    for g in running_groups(self.replicas.values())
                )


NODES = (node("n1", 4), node("n2", 4))


@st.composite
def plans(draw: st.DrawFn) -> list[GroupPlan]:
    """Groups that fill the nodes or less; their places are given, or left open."""
    placed = draw(st.booleans())
    made: list[GroupPlan] = []
    for one in NODES:
        left = draw(st.integers(0, one.num_gpus))
        while left:
            tp = draw(st.sampled_from([size for size in (1, 2, 4) if size <= left]))
            bases = draw(st.sampled_from([(A,), (B,), (C,), (A, B)]))
            names = draw(st.lists(st.sampled_from("pqrs"), unique=True, max_size=3))
            where = (one.name,) * tp if placed else ()
            made.append(group(f"x{len(made)}", *bases, tp=tp, nodes=where, adapters=names))
            left -= tp
    return draw(st.permutations(made))


@settings(max_examples=150, deadline=None)
@given(st.lists(plans(), min_size=2, max_size=4), st.data())
def test_every_plan_is_reached_from_every_other(steps: list[list[GroupPlan]], data: st.DataObject) -> None:
    machines = Machines(*NODES)

    def choose(busy: list[Replica]) -> Replica:
        return data.draw(st.sampled_from(busy))

    for plan in steps:
        # Some turns towards it, with deaths on the way, before the next one comes: changes are interrupted.
        for _ in range(data.draw(st.integers(0, 4))):
            machines.act(machines.decide(plan))
            machines.advance(choose)
            if machines.replicas and data.draw(st.integers(0, 9)) == 0:
                machines.kill(data.draw(st.sampled_from(sorted(machines.replicas))))
    machines.reach(steps[-1], choose)
    decided = machines.decide(steps[-1])
    assert decided.actions == ()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_last_replica_of_a_base_goes_last(data: st.DataObject) -> None:
    """On one node of equal groups, where any of them could make room for any other."""
    size = data.draw(st.integers(1, 5))
    machines = Machines(node("n1", size))

    def plan_of(gpu: str) -> list[GroupPlan]:
        bases = data.draw(st.lists(st.sampled_from([A, B, C]), min_size=1, max_size=size))
        # Another GPU type in the plan is another kind of group: nothing of the old plan is kept.
        return [group(f"x{i}", base, gpu=gpu) for i, base in enumerate(bases)]

    def choose(busy: list[Replica]) -> Replica:
        return data.draw(st.sampled_from(busy))

    machines.nodes = (node("n1", size, gpu="old"),)
    machines.reach(plan_of("old"), choose)
    machines.nodes = (node("n1", size, gpu="new"),)
    new = plan_of("new")
    wanted = {placed.base_model_id for one in new for placed in one.bases}
    for _ in range(MAX_TURNS):
        before = machines.serving()
        old = [r for r in machines.replicas.values() if r.state is ReplicaState.SERVING and r.target.gpu == "old"]
        decided = machines.decide(new)
        drained = {i for action in decided.actions if isinstance(action, Drain) for i in action.replica_ids}
        left = before - Counter(machines.replicas[i].target.base_model_id for i in drained)
        for base in wanted & before.keys():
            if not left[base]:
                assert all(before[replica.target.base_model_id] == 1 for replica in old), (base, decided.actions)
                assert len(drained) == 1
        machines.act(decided)
        if decided.settled:
            return
        machines.advance(choose)
    pytest.fail("not there")


def test_with_room_for_both_the_new_group_serves_before_the_old_one_drains() -> None:
    machines = Machines(node("n1", 4))
    machines.reach([group("x", A, tp=1)], min_by_id)
    decided = machines.decide([group("x", A, tp=2)])
    assert [type(action) for action in decided.actions] == [StartReplicas]
    machines.act(decided)
    assert machines.decide([group("x", A, tp=2)]).actions == ()
    machines.advance(min_by_id)
    (drain,) = machines.decide([group("x", A, tp=2)]).actions
    assert isinstance(drain, Drain)


def test_another_adapter_set_is_no_restart_and_never_leaves_an_adapter_nowhere() -> None:
    machines = Machines(node("n1", 2))
    machines.reach([group("x", A, adapters="pq"), group("y", A, adapters="r")], min_by_id)
    started = machines.count
    swapped = [group("x", A, adapters="p"), group("y", A, adapters="rq")]
    (first,) = machines.decide(swapped).actions
    assert isinstance(first, Assign)
    assert {share.name for share in first.adapters} == {"r", "q"}
    machines.act(machines.decide(swapped))
    (second,) = machines.decide(swapped).actions
    assert isinstance(second, Assign)
    assert adapter_keys(second.adapters) == {("acme", "p")}
    machines.reach(swapped, min_by_id)
    assert machines.count == started


def test_what_drains_is_taken_back_when_it_is_wanted_again() -> None:
    machines = Machines(node("n1", 2))
    machines.reach([group("x", A), group("y", A)], min_by_id)
    machines.act(machines.decide([group("x", A)]))
    assert sum(r.state is ReplicaState.DRAINING for r in machines.replicas.values()) == 1
    started = machines.count
    machines.reach([group("x", A), group("y", A)], min_by_id)
    assert machines.count == started


def test_a_smaller_fleet_keeps_a_replica_of_each_base_and_says_what_it_leaves_out() -> None:
    plan = [group("x", A), group("y", A), group("z", B)]
    machines = Machines(node("n1", 2))
    for _ in range(20):
        decided = machines.decide(plan)
        machines.act(decided)
        machines.advance(min_by_id)
    assert machines.serving() == Counter({A: 1, B: 1})
    assert decided.left_out == {1}
    assert decided.settled


def test_a_group_whose_node_is_gone_goes_elsewhere_and_stays_there() -> None:
    plan = [group("x", A, nodes=["n1"]), group("y", B, nodes=["n2"])]
    machines = Machines(node("n1", 1), node("n2", 2))
    machines.reach(plan, min_by_id)
    machines.nodes = (node("n2", 2),)
    machines.kill(next(i for i, r in machines.replicas.items() if r.target.base_model_id == A))
    for _ in range(10):
        machines.act(machines.decide(plan))
        machines.advance(min_by_id)
    assert machines.serving() == Counter({A: 1, B: 1})
    machines.nodes = (node("n1", 1), node("n2", 2))
    assert machines.decide(plan).actions == ()


def test_a_woken_base_stops_nothing_and_yields_to_the_plan() -> None:
    machines = Machines(node("n1", 1))
    machines.reach([group("x", A)], min_by_id)
    woken = [group("woken-b", B)]
    assert machines.decide([group("x", A)], woken).actions == ()
    machines.nodes = (node("n1", 2),)
    machines.act(machines.decide([group("x", A)], woken))
    machines.advance(min_by_id)
    assert machines.serving() == Counter({A: 1, B: 1})
    plan = [group("x", A), group("y", A)]
    for _ in range(10):
        machines.act(machines.decide(plan, woken))
        machines.advance(min_by_id)
    assert machines.serving() == Counter({A: 2})


def test_where_the_cluster_may_grow_a_group_without_room_waits_on_the_machines() -> None:
    machines = Machines(node("n1", 1))
    machines.reach([group("x", A)], min_by_id)
    plan = [group("x", A), group("y", A)]
    decided = machines.decide(plan, may_grow=True)
    (start,) = decided.actions
    assert isinstance(start, StartReplicas)
    assert start.nodes == ()
    machines.act(decided)
    assert machines.decide(plan, may_grow=True).actions == ()
    machines.nodes = (node("n1", 1), node("n2", 1))
    machines.advance(min_by_id)
    assert machines.decide(plan, may_grow=True).settled


def min_by_id(busy: list[Replica]) -> Replica:
    return min(busy, key=lambda replica: replica.target.replica_id)
