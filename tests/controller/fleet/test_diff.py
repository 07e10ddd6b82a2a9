"""Decisions alone: whatever runs and whatever is wanted, the actions lead there, within the GPUs, and harm little."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex.controller.fleet.diff import Assign, Drain, StartReplicas
from loraplex.controller.fleet.state import Replica, ReplicaState, adapter_keys
from loraplex.core.plan import GroupPlan

from tests.controller.fleet.machines import MAX_TURNS, Machines
from tests.controller.fleet.world import A, B, C, group, node

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


def test_another_part_of_the_arena_is_another_group() -> None:
    machines = Machines(node("n1", 2))
    both = group("x0", A, B)
    machines.reach([both], lambda busy: busy[0])
    before = set(machines.replicas)

    def with_shares(*shares: float) -> list[GroupPlan]:
        placed = zip(both.bases, shares, strict=True)
        return [replace(both, bases=tuple(replace(one, arena_share=share) for one, share in placed))]

    assert machines.decide(with_shares(0.5, 0.5)).actions == (), "the same parts in other words"
    machines.reach(with_shares(3.0, 1.0), lambda busy: busy[0])
    assert not before & set(machines.replicas)
    assert {one.arena_share for r in machines.replicas.values() for one in r.target.bases} == {3.0, 1.0}


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
