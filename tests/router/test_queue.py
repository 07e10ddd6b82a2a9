"""The queue of a base and the service that its order counts."""

from collections import Counter
from collections.abc import Hashable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex.core.ids import TenantName
from loraplex.router.queue import Ticket, WaitingQueue
from loraplex.tenancy.fairness import ServiceCounters

A, B = TenantName("a"), TenantName("b")


def anywhere(only: Hashable) -> bool:
    return True


def ticket(
    order: int, tenant: TenantName = A, *, due_s: float = 0.0, only: Hashable = None, weight: float = 1.0
) -> Ticket:
    return Ticket(tenant=tenant, order=order, due_s=due_s, only=only, weight=weight)


tickets = st.builds(
    Ticket,
    tenant=st.sampled_from([A, B]),
    order=st.just(0),
    due_s=st.sampled_from([0.0, 1.0, 2.0]),
    resumed=st.booleans(),
    offline=st.booleans(),
    only=st.sampled_from([None, "x", "y"]),
)


@given(st.lists(tickets, max_size=12), st.sets(st.sampled_from([None, "x", "y"])), st.data())
def test_who_is_next_is_the_least_of_those_that_may(given_: list[Ticket], may: set[str], data: st.DataObject) -> None:
    counters = ServiceCounters()
    queue: WaitingQueue[int] = WaitingQueue(counters)
    waiting: dict[int, Ticket] = {}
    for order, found in enumerate(given_):
        counters.enter(found.tenant)
        counters.charge(found.tenant, data.draw(st.floats(0, 3)))
        waiting[order] = Ticket(
            tenant=found.tenant,
            order=order,
            due_s=found.due_s,
            resumed=found.resumed,
            offline=found.offline,
            only=found.only,
        )
        queue.push(order, waiting[order])
    while True:
        queue.validate()
        expected = min(
            (order for order, t in waiting.items() if t.only in may),
            key=lambda order: (
                not waiting[order].resumed,
                waiting[order].offline,
                counters.value(waiting[order].tenant),
                waiting[order].due_s,
                order,
            ),
            default=None,
        )
        chosen = queue.next(lambda only: only in may)
        assert chosen == expected
        if chosen is None:
            return
        assert queue.remove(chosen)
        assert not queue.remove(chosen)
        del waiting[chosen]


def serve(counters: ServiceCounters, weights: dict[TenantName, float], num_turns: int) -> Counter[TenantName]:
    """All tenants always wait; each turn takes a second."""
    queue: WaitingQueue[int] = WaitingQueue(counters)
    turns: Counter[TenantName] = Counter()
    for order, tenant in enumerate(weights):
        queue.push(order, ticket(order, tenant))
    for order in range(len(weights), len(weights) + num_turns):
        chosen = queue.next(anywhere)
        assert chosen is not None
        tenant = next(t for t in weights if counters.value(t) == min(map(counters.value, weights)))
        turns[tenant] += 1
        queue.remove(chosen)
        counters.charge(tenant, 1.0, weight=weights[tenant])
        queue.push(order, ticket(order, tenant))
    return turns


def test_weights_divide_the_service() -> None:
    counters = ServiceCounters()
    for tenant in (A, B):
        counters.enter(tenant)
    assert serve(counters, {A: 1.0, B: 3.0}, 400)[B] == pytest.approx(300, abs=2)


def test_who_comes_back_has_saved_nothing_up() -> None:
    counters = ServiceCounters()
    counters.enter(A)
    counters.charge(A, 100.0)
    counters.enter(B)
    assert counters.value(B) == 100.0
    counters.charge(B, 50.0)
    counters.leave(B)
    counters.enter(B)
    assert counters.value(B) == 150.0
    counters.charge(A, 500.0)
    counters.leave(B)
    counters.enter(B)
    assert counters.value(B) == 600.0
    counters.validate({A: 1, B: 1})


def test_what_was_expected_and_taken_back_puts_nobody_behind() -> None:
    counters = ServiceCounters()
    for _ in range(3):
        counters.enter(A)
        counters.expect(A, 100.0)
    counters.enter(B)
    assert counters.value(A) == 300.0
    assert counters.value(B) == 0.0
    counters.expect(B, 250.0, weight=2.0)
    assert counters.value(B) == 125.0
    for _ in range(3):
        counters.expect(A, -100.0)
        counters.charge(A, 10.0)
    assert counters.value(A) == 30.0
    # Whoever comes now is lifted to what the least has had, not to what it may come to have.
    other = TenantName("c")
    counters.enter(other)
    assert counters.value(other) == 0.0
    counters.expect(B, -250.0, weight=2.0)
    counters.charge(B, 90.0, weight=2.0)
    counters.leave(other)
    counters.enter(other)
    assert counters.value(other) == 30.0
    counters.validate({A: 3, B: 1, other: 1})


def test_of_many_in_front_only_those_of_a_fair_turn_are_ahead() -> None:
    counters = ServiceCounters()
    queue: WaitingQueue[int] = WaitingQueue(counters)
    assert queue.num_ahead(B) == 0
    for order in range(100):
        counters.enter(A)
        queue.push(order, ticket(order))
    assert queue.num_ahead(B) == 1
    assert queue.num_ahead(A) == 100


def test_a_full_queue_takes_from_who_has_most_in_it() -> None:
    counters = ServiceCounters()
    queue: WaitingQueue[int] = WaitingQueue(counters)
    assert queue.makes_way(A) is None
    for order in range(4):
        counters.enter(A)
        queue.push(order, ticket(order, due_s=-float(order)))
    assert queue.makes_way(A) is None
    assert queue.makes_way(B) == 0
    for order in (4, 5, 6):
        counters.enter(B)
        queue.push(order, ticket(order, B))
    assert queue.makes_way(B) is None
    assert queue.makes_way(TenantName("c")) == 0


def test_places_in_a_full_queue_and_turns_are_by_weight() -> None:
    queue: WaitingQueue[int] = WaitingQueue(counters := ServiceCounters())
    for order in range(6):
        tenant = A if order < 4 else B
        counters.enter(tenant)
        queue.push(order, ticket(order, tenant, weight=4.0 if tenant == A else 1.0))
    # Four of weight 4 are less than two of weight 1.
    assert queue.makes_way(A, 4.0) == 5
    assert queue.makes_way(B, 1.0) is None
    # Before B's third turn A has twelve; before A's fifth B has one.
    assert queue.num_ahead(B, 1.0) == 6
    assert queue.num_ahead(A, 4.0) == 5
    for order in range(4):
        queue.remove(order)
    assert queue.num_ahead(B, 1.0) == 2
    queue.validate()
