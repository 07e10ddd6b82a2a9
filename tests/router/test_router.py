"""The router against scripted replicas: order, wake-ups, what is sent when. No network."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex.core.control import ReplicaRoute
from loraplex.core.errors import ReplicaLost, Unavailable
from loraplex.core.ids import BaseModelId, GatewayId, ReplicaId, RequestId, TenantName
from loraplex.core.request import EngineRequest, FinishReason, OutputToken, Priority, RequestOutput, SamplingParams
from loraplex.core.wire import LoadReport, ReplicaFrame, ReplicaInfo, decode_replica_frame, encode
from loraplex.router.client import ReplicaListener
from loraplex.router.config import RouterConfig
from loraplex.router.router import Router
from loraplex.router.stream import RoutedStream

BASE = BaseModelId("base")
_ids = itertools.count()


class ScriptedReplica:
    """Implements ReplicaClient; a test plays the replica."""

    def __init__(self, route: ReplicaRoute, listener: ReplicaListener) -> None:
        self.route = route
        self.listener = listener
        self.submitted: dict[RequestId, EngineRequest] = {}
        self.aborted: list[RequestId] = []
        self.closed = False

    def send(self, submits: tuple[EngineRequest, ...], aborts: tuple[RequestId, ...]) -> None:
        self.submitted.update({request.request_id: request for request in submits})
        self.aborted.extend(aborts)

    async def close(self) -> None:
        self.closed = True

    def up(self, credits: int = 100, num_received: int | None = None) -> None:
        info = ReplicaInfo(
            replica_id=self.route.replica_id, base_model_id=BASE, max_context_tokens=100, num_pages=10, page_size=4
        )
        load = LoadReport(credits=credits, num_received=num_received, resident_adapters=())
        self.listener.on_frame(ReplicaFrame(replica=info, load=load))

    def report(self, credits: int, num_received: int | None = None) -> None:
        self.listener.on_frame(ReplicaFrame(load=LoadReport(credits=credits, num_received=num_received)))

    def answer(self, *names: str, tokens: tuple[int, ...] = (), end: bool = False) -> None:
        outputs = tuple(
            RequestOutput(
                request_id=RequestId(name),
                tokens=tuple(OutputToken(token_id=token) for token in tokens),
                finish_reason=FinishReason.STOP if end else None,
                num_cached_tokens=3,
            )
            for name in names
        )
        self.listener.on_frame(ReplicaFrame(outputs=outputs))

    def down(self) -> None:
        self.submitted.clear()
        self.listener.on_down("test")


class World:
    def __init__(self, *names: str, **config: float) -> None:
        self.replicas: dict[str, ScriptedReplica] = {}
        self.router = Router(
            gateway_id=GatewayId("g"),
            config=RouterConfig(**config),  # type: ignore[arg-type]
            connect=self.connect,
        )
        self.router.update(tuple(map(route, names)), "secret")

    def connect(self, route: ReplicaRoute, listener: ReplicaListener) -> ScriptedReplica:
        self.replicas[route.replica_id] = ScriptedReplica(route, listener)
        return self.replicas[route.replica_id]


def route(name: str) -> ReplicaRoute:
    return ReplicaRoute(replica_id=ReplicaId(name), base_model_id=BASE, address="nowhere:1")


def make(name: str | None = None, *, tenant: str = "t", offline: bool = False) -> EngineRequest:
    return EngineRequest(
        request_id=RequestId(name or f"q{next(_ids)}"),
        tenant=TenantName(tenant),
        base_model_id=BASE,
        adapter=None,
        prompt_token_ids=(1, 2, 3),
        sampling=SamplingParams(max_tokens=100, seed=0),
        arrival_s=0.0,
        cache_salt=tenant,
        priority=Priority.OFFLINE if offline else Priority.ONLINE,
    )


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World("a")
    yield world
    await world.router.close()


async def test_all_generations_of_a_request_go_to_one_replica() -> None:
    world = World("a", "b")
    for replica in world.replicas.values():
        replica.up(credits=1)
    stream = world.router.dispatch((make("x"), make("y"), make("z")))
    assert sorted(len(replica.submitted) for replica in world.replicas.values()) == [0, 3]
    assert stream.replica_id in world.replicas
    await world.router.close()
    assert all(replica.closed for replica in world.replicas.values())


async def test_credits_bound_what_is_sent_and_reports_bring_new_ones(world: World) -> None:
    replica = world.replicas["a"]
    replica.up(credits=2)
    for i in range(5):
        world.router.dispatch((make(f"x{i}"),))
    assert list(replica.submitted) == ["x0", "x1"]
    assert world.router.num_queued() == 3
    replica.report(credits=1)
    assert list(replica.submitted) == ["x0", "x1", "x2"]
    replica.report(credits=0)
    assert world.router.num_queued() == 2


async def test_a_report_from_before_the_submits_brings_no_credits(world: World) -> None:
    replica = world.replicas["a"]
    replica.up(credits=4, num_received=0)
    for i in range(12):
        world.router.dispatch((make(f"x{i}"),))
    for _ in range(3):
        replica.report(credits=4, num_received=0)
    assert len(replica.submitted) == 4
    replica.report(credits=2, num_received=3)
    assert len(replica.submitted) == 5
    replica.report(credits=0, num_received=5)
    assert len(replica.submitted) == 5
    # Three ended at once there.
    replica.report(credits=3, num_received=5)
    assert len(replica.submitted) == 8


async def test_a_new_stream_counts_from_nothing(world: World) -> None:
    replica = world.replicas["a"]
    replica.up(credits=4, num_received=0)
    for i in range(12):
        world.router.dispatch((make(f"x{i}"),))
    replica.report(credits=1, num_received=4)
    replica.down()
    replica.up(credits=4, num_received=0)
    assert len(replica.submitted) == 4
    replica.report(credits=0, num_received=4)
    replica.report(credits=2, num_received=4)
    assert len(replica.submitted) == 6


async def test_the_queue_is_online_first_then_the_tenant_with_least() -> None:
    world = World("a")
    replica = world.replicas["a"]
    replica.up(credits=2)
    for name in ("run0", "run1"):
        world.router.dispatch((make(name, tenant="big"),))
    world.router.dispatch((make("off", tenant="small", offline=True),))
    world.router.dispatch((make("big", tenant="big"),))
    world.router.dispatch((make("small0", tenant="small"),))
    world.router.dispatch((make("small1", tenant="small"),))
    for _ in range(4):
        replica.report(credits=1)
    assert list(replica.submitted)[2:] == ["small0", "small1", "big", "off"]
    await world.router.close()


async def test_a_frame_wakes_a_stream_once_with_all_that_it_brought(world: World) -> None:
    replica = world.replicas["a"]
    replica.up()
    stream = world.router.dispatch((make("x"), make("y")))
    reading = asyncio.create_task(stream.next_outputs())
    await asyncio.sleep(0)
    replica.answer("x", "y", "unknown", tokens=(1, 2))
    outputs = await reading
    assert [output.request_id for output in outputs] == ["x", "y"]
    replica.answer("x", tokens=(3,), end=True)
    replica.answer("y", tokens=(4,), end=True)
    assert len(await stream.next_outputs()) == 2
    assert await stream.next_outputs() == ()


async def test_abort_is_sent_once_and_later_outputs_are_ignored(world: World) -> None:
    replica = world.replicas["a"]
    replica.up()
    stream = world.router.dispatch((make("x"), make("y")))
    replica.answer("x", end=True)
    reading = asyncio.create_task(stream.next_outputs())
    await asyncio.sleep(0)
    stream.abort()
    stream.abort()
    replica.answer("y", tokens=(1,))
    assert replica.aborted == ["y"]
    await reading
    assert await stream.next_outputs() == ()


async def test_an_aborted_request_leaves_the_queue(world: World) -> None:
    world.replicas["a"].up(credits=0)
    stream = world.router.dispatch((make("x"),))
    stream.abort()
    assert world.router.num_queued() == 0
    world.replicas["a"].report(credits=5)
    assert world.replicas["a"].submitted == {}


async def test_what_waits_for_a_base_without_a_route_is_refused(world: World) -> None:
    stream = world.router.dispatch((make("x"),))
    world.router.update((), "secret")
    with pytest.raises(Unavailable):
        await stream.next_outputs()


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
    st.lists(st.tuples(st.sampled_from(["answer", "down", "up", "report", "route"]), st.integers(0, 2)), max_size=60)
)
def test_no_token_is_lost_or_sent_twice_whatever_breaks(events: list[tuple[str, int]]) -> None:
    asyncio.run(_break_things(events))


async def _break_things(events: list[tuple[str, int]]) -> None:
    names = ("a", "b", "c")
    world = World(*names, max_losses=1000)
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
        elif kind == "route":
            # Never all of them: what waits for a base without a route is refused at once.
            routed = routed ^ {names[index]} or routed
            world.router.update(tuple(route(name) for name in sorted(routed)), "secret")
            await asyncio.sleep(0)
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
    assert world.router._queue._placed == {}
    await world.router.close()


def _all_replicas(world: World) -> list[ScriptedReplica]:
    links = (*world.router._links.values(), *world.router._leaving)
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


async def test_the_token_path_sustains_256_streams(world: World) -> None:
    """20,000 tokens/s per core, decoding of frames included; measured in CPU time, with a wide margin."""
    replica = world.replicas["a"]
    replica.up(credits=256)
    names = [f"s{i}" for i in range(256)]
    streams = [world.router.dispatch((make(name),)) for name in names]
    num_steps = 60
    frames = [
        encode(
            ReplicaFrame(
                outputs=tuple(
                    RequestOutput(
                        request_id=RequestId(name),
                        tokens=(OutputToken(token_id=step),),
                        finish_reason=FinishReason.LENGTH if step == num_steps - 1 else None,
                    )
                    for name in names
                ),
                load=LoadReport(num_running=256),
            )
        )
        for step in range(num_steps)
    ]

    async def consume(stream: RoutedStream) -> int:
        count = 0
        while outputs := await stream.next_outputs():
            count += len(outputs)
        return count

    consumers = [asyncio.create_task(consume(stream)) for stream in streams]
    await asyncio.sleep(0)
    started_s = time.process_time()
    for frame in frames:
        replica.listener.on_frame(decode_replica_frame(frame))
        await asyncio.sleep(0)
    assert sum(await asyncio.gather(*consumers)) == 256 * num_steps
    rate = 256 * num_steps / (time.process_time() - started_s)
    assert rate > 20_000, f"{rate:.0f} tokens/s"
