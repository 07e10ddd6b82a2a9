"""Requests that go from replica to replica, which drain, die or refuse: no token is lost or sent twice."""

import asyncio
import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex.core.errors import Overloaded, ReplicaLost
from loraplex.core.ids import RequestId
from loraplex.core.plan import AdapterShare
from loraplex.core.request import EngineRequest
from loraplex.core.wire import LoadReport, ReplicaFrame
from loraplex.router import pool

from tests.router.scripted import ScriptedReplica, World, make, route


async def test_a_route_that_changes_keeps_its_stream(world: World) -> None:
    replica = world.replicas["a"]
    replica.up()
    world.router.dispatch((make("x"),))
    share = AdapterShare(tenant="t", name="n")
    world.router.update((dataclasses.replace(route("a"), adapters=(share,), group="g1"),), "secret")
    world.router.update((dataclasses.replace(route("a"), draining=True),), "secret")
    world.router.update((route("a"),), "secret")
    assert world.replicas["a"] is replica
    assert not replica.closed
    assert replica.aborted == []
    world.router.dispatch((make("y"),))
    assert list(replica.submitted) == ["x", "y"]
    world.router.update((dataclasses.replace(route("a"), address="elsewhere:2"),), "secret")
    assert world.replicas["a"] is not replica


async def test_a_draining_replica_loses_its_long_requests_at_once_and_the_others_after_a_while() -> None:
    world = World("a", drain_migrate_above_s=2.0, drain_timeout_s=0.1)
    old = world.replicas["a"]
    old.up()
    # Steps of 50 ms: a hundred tokens are 5 s, ten are 0.5 s.
    old.listener.on_frame(ReplicaFrame(load=LoadReport(credits=100, steps=10, busy_s=0.5)))
    long, short = world.router.dispatch((make("long"),)), world.router.dispatch((make("short", max_tokens=10),))
    old.answer("long", "short", tokens=(0, 1))
    world.router.update((dataclasses.replace(route("a"), draining=True), route("b")), "secret")
    assert old.aborted == []
    new = world.replicas["b"]
    new.up(credits=1)
    assert old.aborted == ["long"]
    (moved,) = new.submitted.values()
    assert moved.resumed_token_ids == (0, 1)
    # What the old replica had on its way is not taken for more.
    old.answer("long", tokens=(2,))
    old.answer("long", tokens=(3,), end=True)
    new.answer(moved.request_id, tokens=(2, 3), end=True)
    await asyncio.sleep(0.15)
    assert old.aborted == ["long"]
    new.report(credits=1)
    assert old.aborted == ["long", "short"]
    assert [output.request_id for output in await long.next_outputs()] == ["long"] * 2
    assert [t.token_id for t in (await short.next_outputs())[0].tokens] == [0, 1]
    assert await long.next_outputs() == ()
    await world.router.close()


async def test_without_another_replica_what_drains_ends_where_it_is(world: World) -> None:
    replica = world.replicas["a"]
    replica.up()
    stream = world.router.dispatch((make("x"),))
    world.router.update((), "secret")
    await asyncio.sleep(0)
    assert not replica.closed
    replica.answer("x", tokens=(1,), end=True)
    await asyncio.sleep(0)
    assert replica.closed
    assert len(await stream.next_outputs()) == 1


async def test_tokens_of_an_earlier_run_on_the_same_replica_are_not_sent_twice() -> None:
    world = World("a", "b", drain_timeout_s=0.0)
    a, b = world.replicas["a"], world.replicas["b"]
    a.up(credits=0)
    b.up()
    stream = world.router.dispatch((make("x"),))
    a.report(credits=9)
    b.answer("x", tokens=(0,))
    world.router.update((route("a"), dataclasses.replace(route("b"), draining=True)), "secret")
    (on_a,) = a.submitted
    world.router.update((dataclasses.replace(route("a"), draining=True), route("b")), "secret")
    again = list(b.submitted)[-1]
    assert len({"x", on_a, again}) == 3
    b.answer("x", tokens=(1,))
    a.answer(on_a, tokens=(1,))
    b.answer(again, tokens=(1,), end=True)
    got = [token.token_id for output in await stream.next_outputs() for token in output.tokens]
    assert got == [0, 1]
    await world.router.close()


async def test_a_replica_that_refuses_for_lack_of_room_is_not_the_last_word() -> None:
    world = World("a", "b")
    for replica in world.replicas.values():
        replica.up()
    stream = world.router.dispatch((make("x"), make("y")))
    first = world.replicas[stream.replica_id or ""]
    (other,) = (replica for replica in world.replicas.values() if replica is not first)
    first.refuse("x")
    first.answer("y", tokens=(1,), end=True)
    assert list(other.submitted) == ["x"]
    other.refuse("x")
    outputs = await stream.next_outputs()
    assert [(o.request_id, o.error_code) for o in outputs] == [("y", None), ("x", "overloaded")]
    assert await stream.next_outputs() == ()
    world.router.validate()
    await world.router.close()


async def test_a_refused_request_holds_up_nobody_and_is_sent_again_when_no_other_has_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool, "_ASK_AGAIN_S", 0.05)
    world = World("a", "b", max_queue_wait_s=0.6)
    a, b = world.replicas["a"], world.replicas["b"]
    a.up()
    b.up(credits=0)
    refused = world.router.dispatch((make("x"),))
    a.submitted.clear()
    a.refuse("x")
    a.report(credits=0)
    world.router.dispatch((make("y"),))
    assert world.router.num_queued() == 2
    a.report(credits=9)
    assert list(a.submitted) == ["y"], "it has credits, and no room for the other's adapter"
    world.router.validate()
    await asyncio.sleep(0.3)
    a.report(credits=9)
    (again,) = a.submitted.keys() - {"y"}
    a.refuse(again)
    assert world.router.num_queued() == 1
    with pytest.raises(Overloaded):  # not a whole wait for each refusal
        await asyncio.wait_for(refused.next_outputs(), 0.45)
    world.router.validate()
    await world.router.close()


async def test_a_refused_request_goes_to_another_as_soon_as_that_has_room() -> None:
    world = World("a", "b")
    a, b = world.replicas["a"], world.replicas["b"]
    a.up()
    b.up(credits=0)
    stream = world.router.dispatch((make("x"),))
    a.refuse("x")
    world.router.validate()
    b.report(credits=1)
    assert stream.replica_id == "b"
    await world.router.close()


async def test_a_resumed_request_tells_cached_tokens_once(world: World) -> None:
    replica = world.replicas["a"]
    replica.up()
    stream = world.router.dispatch((make("x"),))
    replica.answer("x", tokens=(5, 6))
    replica.down()
    replica.up()
    assert replica.submitted[RequestId("x")].resumed_token_ids == (5, 6)
    replica.answer("x", tokens=(7,), end=True)
    outputs = await stream.next_outputs()
    assert [output.num_cached_tokens for output in outputs] == [3, 0]


async def test_a_request_under_which_replicas_die_one_after_another_is_given_up(world: World) -> None:
    replica = world.replicas["a"]
    replica.up()
    deadly, other = world.router.dispatch((make("deadly"),)), world.router.dispatch((make("other"),))
    for token in range(5):
        replica.answer("other", tokens=(token,))
        replica.down()
        replica.up()
    assert list(replica.submitted) == ["other"]
    with pytest.raises(ReplicaLost):
        await deadly.next_outputs()
    assert len(await other.next_outputs()) == 5


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["answer", "down", "up", "report", "crowd", "route", "drain"]), st.integers(0, 2)),
        max_size=60,
    )
)
def test_no_token_is_lost_or_sent_twice_whatever_breaks(events: list[tuple[str, int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "INTERVAL_S", 0.0)
        asyncio.run(_break_things(events))


async def _break_things(events: list[tuple[str, int]]) -> None:
    names = ("a", "b", "c")
    world = World(*names, max_losses=1000, drain_timeout_s=0.0)
    draining: set[str] = set()
    streams = [world.router.dispatch((make(f"x{i}"), make(f"y{i}"))) for i in range(4)]
    routed = set(names)
    for kind, index in events:
        replica = world.replicas[names[index]]
        if kind == "answer":
            _advance(replica)
        elif kind == "down":
            replica.down()
        elif kind == "up" and not replica.closed:
            replica.up(credits=4)
        elif kind == "report":
            replica.report(credits=3)
        elif kind == "crowd":
            # Of other gateways: what is there goes elsewhere, if it has not done so before.
            load = LoadReport(credits=1, num_running=256, num_waiting=200)
            replica.listener.on_frame(ReplicaFrame(load=load))
        elif kind in ("route", "drain"):
            if kind == "route":
                routed ^= {names[index]}
            else:
                draining ^= {names[index]}
            routes = (dataclasses.replace(route(name), draining=name in draining) for name in sorted(routed))
            world.router.update(tuple(routes), "secret")
            await asyncio.sleep(0)
        world.router.validate()
    world.router.update(tuple(map(route, names)), "secret")
    for _ in range(40):
        for name in names:
            world.replicas[name].up(credits=50)
        for replica in _all_replicas(world):
            _advance(replica)
    for stream in streams:
        got: dict[str, list[int]] = {}
        while outputs := await asyncio.wait_for(stream.next_outputs(), 1):
            for output in outputs:
                got.setdefault(output.request_id, []).extend(token.token_id for token in output.tokens)
        assert got == {name: list(range(10)) for name in got}
        assert len(got) == 2
    world.router.validate()
    await world.router.close()


def _all_replicas(world: World) -> list[ScriptedReplica]:
    links = (link for pool in world.router._pools.values() for link in pool.links)
    return [link.client for link in links if isinstance(link.client, ScriptedReplica)]


def _advance(replica: ScriptedReplica) -> None:
    """Each request there gets its next two tokens: token i of a request is i, and ten end it."""
    for request_id, request in tuple(replica.submitted.items()):
        start = len(request.resumed_token_ids)
        tokens = tuple(range(start, min(10, start + 2)))
        end = start + len(tokens) == 10
        if end:
            del replica.submitted[request_id]
        else:
            done = (*request.resumed_token_ids, *tokens)
            replica.submitted[request_id] = EngineRequest(
                **{field: getattr(request, field) for field in request.__slots__ if field != "resumed_token_ids"},
                resumed_token_ids=done,
            )
        replica.answer(request_id, tokens=tokens, end=end)
