"""The router against scripted replicas: what is sent where and when, wake-ups. No network."""

import asyncio
import dataclasses
import time

from loraplex.core.ids import Digest, RequestId
from loraplex.core.plan import AdapterShare
from loraplex.core.request import FinishReason, OutputToken, RequestOutput
from loraplex.core.wire import LoadReport, ReplicaFrame, decode_replica_frame, encode
from loraplex.router.stream import RoutedStream

from tests.router.scripted import World, make, route


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


async def test_an_adapter_that_the_plan_places_runs_there_alone_and_by_its_weights() -> None:
    world = World("a", "b", "c")
    light, heavy = AdapterShare(tenant="t", name="n", weight=1.0), AdapterShare(tenant="t", name="n", weight=3.0)
    routes = [
        dataclasses.replace(route("a"), adapters=(light,)),
        dataclasses.replace(route("b"), adapters=(heavy,)),
        route("c"),
    ]
    world.router.update(tuple(routes), "secret")
    for replica in world.replicas.values():
        replica.up(credits=100_000)
        load = LoadReport(credits=100_000, resident_adapters=(Digest("n" * 64),))
        replica.listener.on_frame(ReplicaFrame(load=load))
    for i in range(400):
        stream = world.router.dispatch((make(adapter="n", prompt=(i, 2)),))
        replica = world.replicas[stream.replica_id or ""]
        replica.answer(*stream.generations, end=True)
        replica.report(credits=100_000)
    counts = {name: len(replica.submitted) for name, replica in world.replicas.items()}
    assert counts["c"] == 0
    assert 0.65 < counts["b"] / 400 < 0.85
    # Without credits at home it waits, though others have some; and what others can take passes it.
    for name in "ab":
        world.replicas[name].report(credits=0)
    waiting = world.router.dispatch((make("waiting", adapter="n"),))
    assert waiting.replica_id is None
    assert world.router.dispatch((make("other", adapter="m"),)).replica_id == "c"
    # Its homes are gone: any replica will do.
    world.router.update((route("c"),), "secret")
    assert waiting.replica_id == "c"
    world.router.validate()
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
