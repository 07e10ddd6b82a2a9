"""Requests that wait in the router: their order, how long they may, and what is refused at once."""

import asyncio
import dataclasses
import time

import pytest
from loraplex.core.errors import Overloaded, Unavailable
from loraplex.core.wire import LoadReport, ReplicaFrame, ReplicaInfo
from loraplex.router import pool as pool_module

from tests.router.scripted import BASE, World, make, route


async def test_tenants_get_the_base_by_their_weights() -> None:
    world = World("a")
    replica = world.replicas["a"]
    replica.up(credits=1)
    world.router.dispatch((make("first", tenant="other"),))
    for i in range(40):
        for tenant, weight in (("one", 1.0), ("three", 3.0)):
            world.router.dispatch((make(f"{tenant}{i}", tenant=tenant, weight=weight),))
    for _ in range(40):
        replica.report(credits=1)
        world.router.validate()
    served = list(replica.submitted)[1:]
    assert len(served) == 40
    assert sum(name.startswith("three") for name in served) == pytest.approx(30, abs=1)
    await world.router.close()


async def test_the_queue_is_online_first_and_gives_tenants_turns() -> None:
    world = World("a")
    replica = world.replicas["a"]
    replica.up(credits=2)
    for name in ("run0", "run1"):
        world.router.dispatch((make(name, tenant="big"),))
    world.router.dispatch((make("off", tenant="small", offline=True),))
    for i in range(3):
        world.router.dispatch((make(f"big{i}", tenant="big"),))
    for i in range(3):
        world.router.dispatch((make(f"small{i}", tenant="small"),))
    for _ in range(7):
        replica.report(credits=1)
        world.router.validate()
    order = list(replica.submitted)[2:]
    # Two of the big one are under way: first the small one has as many.
    assert order[:2] == ["small0", "small1"]
    assert set(order[2:5]) == {"big0", "small2", "big1"}
    assert order[5:] == ["big2", "off"]
    await world.router.close()


async def test_a_request_that_cannot_be_served_in_time_is_refused_at_once_with_the_time_to_come_back() -> None:
    world = World("a", ttft_slo_s=1.0, ttft_patience=2.0, expected_output_tokens=100.0)
    replica = world.replicas["a"]
    info = ReplicaInfo(
        replica_id=replica.route.replica_id,
        base_model_id=BASE,
        max_context_tokens=100,
        num_pages=1000,
        page_size=4,
        max_running=4,
    )

    def report(running: int, waiting: int, steps: int) -> None:
        load = LoadReport(
            credits=100, num_running=running, num_waiting=waiting, steps=steps, busy_s=0.05 * steps, num_free_pages=1000
        )
        replica.listener.on_frame(ReplicaFrame(replica=info, load=load))

    # A life of 100 tokens at 50 ms is 5 s; one of four places is free every 1.25 s.
    report(running=4, waiting=0, steps=10)
    world.router.dispatch((make("x"),))
    report(running=4, waiting=1, steps=20)
    with pytest.raises(Overloaded) as refused:
        world.router.dispatch((make("y"),))
    assert 1.0 <= refused.value.retry_after_s < 2.0
    report(running=4, waiting=5, steps=30)
    with pytest.raises(Overloaded) as refused:
        world.router.dispatch((make("y"),))
    assert 5.0 < refused.value.retry_after_s < 7.0
    world.router.dispatch((make("off", offline=True),))
    patient = dataclasses.replace(make("patient"), deadline_s=time.time() + 10.0)
    world.router.dispatch((patient,))
    assert list(replica.submitted) == ["x", "off", "patient"]
    world.router.validate()
    await world.router.close()


async def test_who_waits_in_the_router_goes_by_deadline_and_no_longer_than_it_has_patience() -> None:
    world = World("a", ttft_slo_s=0.05, ttft_patience=2.0)
    replica = world.replicas["a"]
    replica.up(credits=0)
    late = world.router.dispatch((make("late"),))
    soon = dataclasses.replace(make("soon"), deadline_s=time.time() + 0.04)
    world.router.dispatch((soon,))
    calm = world.router.dispatch((dataclasses.replace(make("calm"), deadline_s=time.time() + 10.0),))
    replica.report(credits=1)
    assert list(replica.submitted) == ["soon"]
    with pytest.raises(Overloaded):
        await asyncio.wait_for(late.next_outputs(), 1)
    replica.report(credits=1)
    assert list(replica.submitted) == ["soon", "calm"]
    assert calm.replica_id == "a"
    world.router.validate()
    await world.router.close()


async def test_an_aborted_request_leaves_the_queue(world: World) -> None:
    world.replicas["a"].up(credits=0)
    stream = world.router.dispatch((make("x"),))
    stream.abort()
    assert world.router.num_queued() == 0
    world.replicas["a"].report(credits=5)
    assert world.replicas["a"].submitted == {}


async def test_what_waits_for_a_base_without_a_route_is_refused_if_nothing_is_to_be_waited_for() -> None:
    world = World("a", max_unserved_wait_s=0.0)
    stream = world.router.dispatch((make("x"),))
    world.router.update((), "secret")
    with pytest.raises(Unavailable):
        await stream.next_outputs()
    with pytest.raises(Unavailable):
        world.router.dispatch((make("y"),))
    await world.router.close()


async def test_a_base_without_a_replica_is_told_of_once_a_second_and_its_requests_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool_module, "_REMIND_S", 0.05)
    told: list[str] = []
    world = World(on_unserved=told.append)
    streams = [world.router.dispatch((make(f"x{i}"),)) for i in range(3)]
    assert told == [BASE]
    await asyncio.sleep(0.12)
    assert told == [BASE] * 3
    draining = dataclasses.replace(route("b"), draining=True)
    world.router.update((draining,), "secret")
    world.replicas["b"].up()
    assert world.replicas["b"].submitted == {}
    world.router.update((draining, route("a")), "secret")
    world.replicas["a"].up()
    assert list(world.replicas["a"].submitted) == ["x0", "x1", "x2"]
    await asyncio.sleep(0.12)
    assert told == [BASE] * 3
    world.replicas["a"].answer("x0", tokens=(1,), end=True)
    assert len(await streams[0].next_outputs()) == 1
    await world.router.close()


async def test_a_request_that_nobody_comes_up_for_is_refused_after_its_time() -> None:
    world = World(max_unserved_wait_s=0.05)
    stream = world.router.dispatch((make("x"),))
    with pytest.raises(Unavailable):
        await asyncio.wait_for(stream.next_outputs(), 1)
    assert world.router.num_queued() == 0
    await world.router.close()
