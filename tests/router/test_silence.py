"""Replicas that say nothing any more without their stream being broken: hung, or behind a network that is."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from loraplex.core.control import ReplicaRoute
from loraplex.core.ids import GatewayId
from loraplex.replica.config import ReplicaConfig
from loraplex.router.client import GrpcReplicaClient, ReplicaListener
from loraplex.router.config import RouterConfig
from loraplex.router.router import Router

from tests.router.replicas import SECRET, Replica, check, eventually, make_request, start_replica

SILENCE_S = 0.6
GATEWAY = GatewayId("g1")


class Wire:
    """TCP from a router to a replica that can be cut without anybody being told."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._open = asyncio.Event()
        self._open.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> ReplicaRoute:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        route = self._replica.route
        return ReplicaRoute(replica_id=route.replica_id, base_model_id=route.base_model_id, address=f"127.0.0.1:{port}")

    def cut(self) -> None:
        self._open.clear()

    def mend(self) -> None:
        self._open.set()

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._replica.port)
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            self._tasks.add(asyncio.create_task(self._carry(source, sink)))

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(1 << 16):
                await self._open.wait()
                sink.write(data)
                await sink.drain()
        finally:
            sink.close()


async def _replica(stack: AsyncExitStack, replica_id: str, *, step_s: float = 0.002) -> Replica:
    config = ReplicaConfig(heartbeat_s=0.1, stop_grace_s=0.0)
    return await start_replica(stack, replica_id, step_s=step_s, config=config)


def _router(stack: AsyncExitStack, *routes: ReplicaRoute) -> Router:
    router = Router(gateway_id=GATEWAY, config=RouterConfig(silence_s=SILENCE_S))
    stack.push_async_callback(router.close)
    router.update(routes, SECRET)
    return router


async def test_what_a_silent_replica_ran_goes_on_elsewhere_and_it_comes_back(stack: AsyncExitStack) -> None:
    behind, beside = [await _replica(stack, name, step_s=0.02) for name in ("behind", "beside")]
    wire = Wire(behind)
    route = await wire.start()
    stack.push_async_callback(wire.close)
    router = _router(stack, route)
    await eventually(lambda: len(router.loads()) == 1)
    request = make_request(max_tokens=60)
    running = asyncio.create_task(check(router, request))
    await eventually(lambda: router.loads()[behind.replica_id].num_running == 1)
    router.update((route, beside.route), SECRET)
    await eventually(lambda: len(router.loads()) == 2)
    wire.cut()
    start_s = asyncio.get_running_loop().time()
    await eventually(lambda: set(router.loads()) == {beside.replica_id})
    silent_s = asyncio.get_running_loop().time() - start_s
    assert silent_s >= SILENCE_S * 0.8
    await running
    assert beside.loop.num_unfinished == 0
    wire.mend()
    await eventually(lambda: len(router.loads()) == 2)
    await check(router, make_request())


async def test_long_steps_and_idleness_are_no_silence(stack: AsyncExitStack, caplog: pytest.LogCaptureFixture) -> None:
    slow = await _replica(stack, "slow", step_s=2 * SILENCE_S)
    router = _router(stack, slow.route)
    await check(router, make_request(max_tokens=2))
    await asyncio.sleep(2 * SILENCE_S)
    assert set(router.loads()) == {slow.replica_id}
    assert "is down" not in caplog.text


async def test_a_replica_that_promises_no_heartbeat_may_be_silent(
    stack: AsyncExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    config = ReplicaConfig(heartbeat_s=60.0, stop_grace_s=0.0)
    older = await start_replica(stack, "older", config=config)
    object.__setattr__(older.loop.info, "heartbeat_s", 0.0)
    router = _router(stack, older.route)
    await check(router, make_request())
    await asyncio.sleep(2 * SILENCE_S)
    assert set(router.loads()) == {older.replica_id}
    assert "is down" not in caplog.text


class TellingClient(GrpcReplicaClient):
    """Calls ``given_up`` in the very turn of the event loop in which it gives its replica up."""

    given_up: Callable[[], None]

    async def _watch(self, call: Any) -> None:
        await super()._watch(call)
        self.given_up()


async def test_a_router_that_closes_while_a_silent_replica_is_given_up_ends(stack: AsyncExitStack) -> None:
    wire = Wire(await _replica(stack, "silent"))
    route = await wire.start()
    stack.push_async_callback(wire.close)
    closing: list[asyncio.Task[None]] = []

    def connect(route: ReplicaRoute, listener: ReplicaListener) -> GrpcReplicaClient:
        client = TellingClient(
            route.address,
            gateway_id=GATEWAY,
            cluster_secret=lambda: SECRET,
            listener=listener,
            config=RouterConfig(silence_s=SILENCE_S),
        )
        client.given_up = lambda: closing.append(asyncio.create_task(router.close()))
        return client

    router = Router(gateway_id=GATEWAY, connect=connect)
    router.update((route,), SECRET)
    await eventually(lambda: len(router.loads()) == 1)
    wire.cut()
    await eventually(lambda: bool(closing))
    # Not ``wait_for``: its cancellation would end what hangs.
    ended, _ = await asyncio.wait(closing, timeout=3.0)
    assert ended == set(closing)
