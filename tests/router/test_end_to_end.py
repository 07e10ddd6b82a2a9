"""Router and replica over a real gRPC stream, with the fake executor."""

import asyncio
import dataclasses
import itertools
from contextlib import AsyncExitStack

import pytest
from loraplex.core.errors import LoraplexError, Overloaded, ReplicaLost, Unavailable
from loraplex.core.request import EngineRequest, FinishReason, RequestOutput
from loraplex.engine import EngineConfig
from loraplex.replica.config import ReplicaConfig
from loraplex.replica.server import ReplicaServer
from loraplex.router.stream import Generation, RoutedStream

from tests.router.replicas import (
    MISSING,
    POISONED,
    SECRET,
    UNSTAGEABLE,
    check,
    eventually,
    make_request,
    read,
    start_replica,
    start_router,
)


async def test_many_requests_over_adapters_get_their_tokens(stack: AsyncExitStack) -> None:
    replicas = [await start_replica(stack, f"replica-{i}") for i in range(2)]
    routers = [start_router(stack, *replicas, gateway=f"g{i}") for i in range(3)]
    adapters = [None, "a" * 64, "b" * 64, "c" * 64]
    await asyncio.gather(
        *(check(routers[i % 3], *(make_request(adapter=adapters[i % 4]) for _ in range(1 + i % 3))) for i in range(60))
    )
    assert all(replica.loop.num_unfinished == 0 for replica in replicas)
    await eventually(lambda: all(load.num_running == 0 for load in routers[0].loads().values()))
    assert sum(load.generated_tokens for load in routers[0].loads().values()) == 20 * sum(1 + i % 3 for i in range(60))


async def test_adapter_requests_go_where_the_adapter_is(stack: AsyncExitStack) -> None:
    replicas = [await start_replica(stack, f"replica-{i}") for i in range(3)]
    router = start_router(stack, *replicas)
    await eventually(lambda: len(router.loads()) == 3)
    homes = set()
    for _ in range(6):
        stream = router.dispatch((make_request(adapter="a" * 64),))
        await read(stream)
        homes.add(stream.replica_id)
    assert len(homes) == 1
    assert sum(bool(replica.executor.loaded) for replica in replicas) == 1


async def test_bad_adapters_end_their_own_requests_only(stack: AsyncExitStack) -> None:
    replica = await start_replica(stack, "replica-0")
    router = start_router(stack, replica)

    async def fails(adapter: str, message: str) -> None:
        _, reasons, errors = await read(router.dispatch((make_request(adapter=adapter),)))
        assert list(reasons.values()) == [FinishReason.ERROR]
        assert message in errors[0]

    await asyncio.gather(
        *(check(router, make_request(max_tokens=60, adapter=a)) for a in (None, "a" * 64, None, "b" * 64)),
        fails(POISONED, "the model failed"),
        fails(UNSTAGEABLE, "not what was registered"),
        fails(MISSING, "could not be read"),
    )
    assert replica.loop.alive
    assert not replica.executor.violations
    await check(router, make_request())


async def test_a_bug_while_a_frame_is_read_costs_a_reconnection_not_the_replica(
    stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = await start_replica(stack, "replica-0")
    router = start_router(stack, replica)
    await check(router, make_request())
    take, calls = Generation.take, itertools.count()

    def buggy(generation: Generation, output: RequestOutput) -> RequestOutput:
        if next(calls) == 3:
            raise ZeroDivisionError
        return take(generation, output)

    monkeypatch.setattr(Generation, "take", buggy)
    await check(router, make_request(max_tokens=30))


async def test_long_prompts_that_are_sent_at_once_go_in_frames_that_the_replica_takes(
    stack: AsyncExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    replica = await start_replica(stack, "replica-0", config=ReplicaConfig(max_frame_bytes=8 << 20, stop_grace_s=0.0))
    router = start_router(stack, replica)
    await eventually(lambda: len(router.loads()) == 1)
    long = [router.dispatch((make_request(length=800_000),)) for _ in range(5)]
    await check(router, make_request())
    for stream in long:
        _, reasons, _ = await read(stream)
        assert set(reasons.values()) == {FinishReason.ERROR}  # the replica's own refusal of the context
    assert "is down" not in caplog.text


async def test_a_strange_secret_is_refused(stack: AsyncExitStack, caplog: pytest.LogCaptureFixture) -> None:
    replica = await start_replica(stack, "replica-0")
    router = start_router(stack, replica, secret="wrong", max_queue_wait_s=0.3)
    with pytest.raises(Unavailable):
        await read(router.dispatch((make_request(),)))
    assert router.loads() == {}
    assert "UNAUTHENTICATED" in caplog.text
    router.update((replica.route,), SECRET)
    await eventually(lambda: bool(router.loads()))
    await check(router, make_request())


async def test_abort_frees_the_pages(stack: AsyncExitStack) -> None:
    replica = await start_replica(stack, "replica-0")
    router = start_router(stack, replica)
    stream = router.dispatch((make_request(max_tokens=400), make_request(max_tokens=400)))
    await stream.next_outputs()
    stream.abort()
    stream.abort()
    while await stream.next_outputs():
        pass
    await eventually(lambda: replica.loop.num_unfinished == 0)
    await eventually(lambda: router.loads()[replica.replica_id].num_free_pages == 256)


async def test_a_gateway_that_leaves_aborts_its_requests(stack: AsyncExitStack) -> None:
    replica = await start_replica(stack, "replica-0")
    leaving, staying = start_router(stack, replica, gateway="g1"), start_router(stack, replica, gateway="g2")
    stream = leaving.dispatch((make_request(max_tokens=450),))
    other = asyncio.create_task(check(staying, make_request(max_tokens=200)))
    await stream.next_outputs()
    await eventually(lambda: replica.loop.num_unfinished == 2)
    await leaving.close()
    with pytest.raises(Unavailable):
        await read(stream)
    await eventually(lambda: replica.loop.num_unfinished == 1)
    await other


async def test_a_lost_replica_loses_no_token(stack: AsyncExitStack) -> None:
    first, second = [await start_replica(stack, f"replica-{i}", step_s=0.005) for i in range(2)]
    router = start_router(stack, first, second)
    await eventually(lambda: len(router.loads()) == 2)
    runs = [
        asyncio.create_task(check(router, make_request(max_tokens=100, adapter=adapter), make_request(max_tokens=90)))
        for adapter in (None, "a" * 64, "b" * 64, "c" * 64) * 2
    ]
    await eventually(lambda: min(load.generated_tokens for load in router.loads().values()) > 100)
    assert first.loop.num_unfinished > 0
    await first.server.stop()
    await asyncio.gather(*runs)
    assert list(router.loads()) == [second.replica_id]


async def test_the_same_replica_goes_on_after_it_is_back(stack: AsyncExitStack) -> None:
    replica = await start_replica(stack, "replica-0", step_s=0.005)
    router = start_router(stack, replica)
    run = asyncio.create_task(check(router, make_request(max_tokens=150)))
    await eventually(lambda: replica.loop.num_unfinished == 1)
    await asyncio.sleep(0.1)
    # The same gateway opens a second stream: the replica ends the first, as after a connection that broke unseen.
    intruder = start_router(stack, replica, gateway="g1")
    await eventually(lambda: bool(intruder.loads()))
    await intruder.close()
    await run


async def test_a_replica_that_stays_away_is_lost(stack: AsyncExitStack) -> None:
    replica = await start_replica(stack, "replica-0", step_s=0.005)
    router = start_router(stack, replica, resume_timeout_s=0.3)
    stream = router.dispatch((make_request(max_tokens=400),))
    await stream.next_outputs()
    await replica.server.stop()
    with pytest.raises(ReplicaLost):
        await read(stream)
    assert router.num_queued() == 0


async def test_what_waits_too_long_or_in_too_great_number_is_refused(stack: AsyncExitStack) -> None:
    replica = await start_replica(stack, "replica-0", step_s=0.01, engine=EngineConfig(max_running=1, max_waiting=1))
    router = start_router(stack, replica, max_queue_wait_s=0.5, max_queued_requests=3)
    await eventually(lambda: bool(router.loads()))
    streams = [router.dispatch((make_request(max_tokens=300),)) for _ in range(5)]
    with pytest.raises(Overloaded) as refused:
        router.dispatch((make_request(),))
    assert refused.value.retry_after_s >= 1.0
    assert router.num_queued() == 3

    async def outcome(stream: RoutedStream) -> object:
        try:
            return list((await read(stream))[1].values())
        except LoraplexError as error:
            return type(error)

    outcomes = [asyncio.create_task(outcome(stream)) for stream in streams]
    assert await asyncio.gather(*outcomes[2:]) == [Overloaded] * 3
    for stream in streams:
        stream.abort()


async def test_queued_requests_run_when_credits_come(stack: AsyncExitStack) -> None:
    replica = await start_replica(stack, "replica-0", engine=EngineConfig(max_running=2, max_waiting=1))
    router = start_router(stack, replica)
    await asyncio.gather(*(check(router, make_request(tenant=f"t{i % 3}")) for i in range(20)))
    assert router.num_queued() == 0


async def test_no_more_is_sent_than_the_replica_gave_credits_for(
    stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = await start_replica(stack, "replica-0", engine=EngineConfig(max_running=2, max_waiting=2))
    router = start_router(stack, replica)
    await eventually(lambda: bool(router.loads()))
    submit, most = replica.loop.submit, 0

    def late(session: int, requests: tuple[EngineRequest, ...]) -> None:
        asyncio.get_running_loop().call_later(0.05, arrive, session, requests)

    def arrive(session: int, requests: tuple[EngineRequest, ...]) -> None:
        nonlocal most
        submit(session, requests)
        most = max(most, replica.loop.num_unfinished + len(requests))

    async def dispatch(delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        await check(router, make_request(max_tokens=30))

    # While the first one runs, a frame comes after every step, whatever else is on its way.
    running = asyncio.create_task(check(router, make_request(max_tokens=400)))
    await eventually(lambda: replica.loop.num_unfinished == 1)
    monkeypatch.setattr(replica.loop, "submit", late)
    await asyncio.gather(*(dispatch(i * 0.005) for i in range(12)))
    await running
    assert most == 4


async def test_an_error_keeps_its_kind_on_the_wire(stack: AsyncExitStack) -> None:
    replica = await start_replica(stack, "replica-0")
    router = start_router(stack, replica)
    codes = []
    for request in (make_request(length=600), make_request(adapter=UNSTAGEABLE), make_request(adapter=POISONED)):
        stream = router.dispatch((request,))
        (output,) = await stream.next_outputs()
        codes.append(output.error_code)
    assert codes == ["context_length_exceeded", "invalid_adapter", "generation_failed"]


async def test_unknown_base_and_removed_route(stack: AsyncExitStack) -> None:
    first, second = [await start_replica(stack, f"replica-{i}", step_s=0.005) for i in range(2)]
    router = start_router(stack, max_unserved_wait_s=0.0)
    with pytest.raises(Unavailable):
        router.dispatch((make_request(),))
    router.update((first.route,), SECRET)
    run = asyncio.create_task(check(router, make_request(max_tokens=100)))
    await eventually(lambda: first.loop.num_unfinished == 1)
    router.update((second.route,), SECRET)
    await check(router, make_request())
    assert set(router.loads()) == {"replica-0", "replica-1"}
    await run
    await eventually(lambda: set(router.loads()) == {"replica-1"})


async def test_engine_refusals_come_back_as_errors(stack: AsyncExitStack) -> None:
    replica = await start_replica(stack, "replica-0")
    router = start_router(stack, replica)
    _, reasons, errors = await read(router.dispatch((make_request(length=600),)))
    assert list(reasons.values()) == [FinishReason.ERROR]
    assert "context" in errors[0]


async def test_a_stopping_replica_finishes_what_runs(stack: AsyncExitStack) -> None:
    replica = await start_replica(stack, "replica-0", step_s=0.005)
    replica.server = ReplicaServer(replica.loop, cluster_secret=SECRET, config=ReplicaConfig(stop_grace_s=10.0))
    replica.port = await replica.server.start("127.0.0.1")
    router = start_router(stack, replica)
    run = asyncio.create_task(check(router, make_request(max_tokens=100)))
    await eventually(lambda: replica.loop.num_unfinished == 1)
    await replica.server.stop()
    await run
    await eventually(lambda: not replica.loop.alive)
    assert replica.executor.closed


async def test_what_runs_on_a_draining_replica_moves_and_keeps_its_tokens(stack: AsyncExitStack) -> None:
    first, second = [await start_replica(stack, f"replica-{i}", step_s=0.005) for i in range(2)]
    router = start_router(stack, first, drain_timeout_s=0.0)
    runs = [
        asyncio.create_task(check(router, make_request(max_tokens=150, adapter=adapter), make_request(max_tokens=90)))
        for adapter in (None, "a" * 64, "b" * 64)
    ]
    await eventually(lambda: first.loop.num_unfinished == 6 and router.loads()["replica-0"].generated_tokens > 60)
    router.update((dataclasses.replace(first.route, draining=True), second.route), SECRET)
    await eventually(lambda: first.loop.num_unfinished == 0)
    assert second.loop.num_unfinished == 6
    assert set(router.loads()) == {"replica-0", "replica-1"}
    # And back, to a replica that may have tokens of their first run on the way.
    router.update((first.route, dataclasses.replace(second.route, draining=True)), SECRET)
    await eventually(lambda: second.loop.num_unfinished == 0)
    await asyncio.gather(*runs)
