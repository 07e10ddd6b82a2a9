"""PostgreSQL dies or cannot be reached: what was acknowledged is there, what failed is not, and the controller goes on
without a restart."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import psycopg
import pytest
from loraplex.controller.config import ControllerOptions
from loraplex.controller.controller import Controller
from loraplex.core.control import TenantDemand
from loraplex.core.errors import Unavailable
from loraplex.core.ids import GatewayId
from loraplex.core.tenant import TenantLimits, UsageRow

from tests.controller.calls import ACME, newest, with_database
from tests.database.postgres import PostgresServer

pytestmark = [pytest.mark.alone, pytest.mark.parametrize("new_database", ["postgresql"], indirect=True)]


def _stored(url: str) -> set[str]:
    with psycopg.connect(url) as connection:
        return {str(row[0]) for row in connection.execute("SELECT name FROM tenants")}


async def _eventually(change: Callable[[], Any]) -> None:
    async with asyncio.timeout(30):
        while True:
            try:
                await change()
                return
            except Unavailable:
                await asyncio.sleep(0.05)


async def test_kill_minus_nine_during_writes(
    controller: Controller, postgres: PostgresServer, database_url: str
) -> None:
    acknowledged: set[str] = set()
    failed: set[str] = set()
    enough = asyncio.Event()
    draw = random.Random(1)

    async def write(lane: int) -> None:
        number = 0
        while not enough.is_set():
            number += 1
            name = f"tenant-{lane}-{number}"
            try:
                await controller.create_tenant(name, TenantLimits())
                acknowledged.add(name)
            except Unavailable:
                failed.add(name)
                await asyncio.sleep(0.02)

    writing = [asyncio.create_task(write(lane)) for lane in range(3)]
    for _ in range(3):
        before = len(acknowledged)
        while len(acknowledged) < before + 5:  # noqa: ASYNC110 (what is waited for has no event)
            await asyncio.sleep(0.01)
        await asyncio.sleep(draw.uniform(0, 0.1))
        await asyncio.to_thread(postgres.kill)
        await asyncio.sleep(0.2)
        await asyncio.to_thread(postgres.start)
    before = len(acknowledged)
    while len(acknowledged) < before + 5:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    enough.set()
    await asyncio.gather(*writing)
    stored = _stored(database_url)
    assert failed, "some met the server while it was away"
    assert acknowledged <= stored, "nothing that was acknowledged is lost"
    assert failed & stored == set(), "and nothing that failed has happened"
    assert {tenant.name for tenant in (await newest(controller)).tenants} == stored
    assert controller.epoch == 1


async def test_away_for_a_while(controller: Controller, postgres: PostgresServer) -> None:
    await controller.create_tenant(ACME, TenantLimits(requests_per_minute=60))
    gateway = GatewayId("gateway-1")
    usage = (UsageRow(tenant=ACME, requests=1, prompt_tokens=2, output_tokens=3),)
    await asyncio.to_thread(postgres.stop)
    try:
        for _ in range(3):
            with pytest.raises(Unavailable, match="does not answer"):
                await controller.create_tenant("globex", TenantLimits())
            with pytest.raises(Unavailable, match="does not answer"):
                await controller.report_usage(gateway, usage)
            assert [tenant.name for tenant in (await newest(controller)).tenants] == [ACME]
            demand = (TenantDemand(tenant=ACME, requests=5, tokens=100, running=1),)
            assert {share.tenant for share in await controller.lease_quota(gateway, demand, ())} == {"*", ACME}
    finally:
        await asyncio.to_thread(postgres.start)
    await _eventually(lambda: controller.create_tenant("globex", TenantLimits()))
    await controller.report_usage(gateway, usage)
    assert (await controller.usage(ACME)).output_tokens == 3
    assert controller.epoch == 1


class Wire:
    """A TCP connection to the server that can be cut in the middle of the next commit."""

    def __init__(self, port: int) -> None:
        self._server_port = port
        self._cut = ""
        self.is_up = True
        self.was_cut = asyncio.Event()
        self._pairs: set[asyncio.StreamWriter] = set()

    async def start(self) -> int:
        self._listening = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return int(self._listening.sockets[0].getsockname()[1])

    async def close(self) -> None:
        self._hang_up()
        self._listening.close()

    def cut_at_commit(self, when: str) -> None:
        """``before`` the server hears of it, or ``after`` it has answered; then nobody gets through."""
        self._cut = when

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self.is_up:
            writer.close()
            return
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._server_port)
        self._pairs |= {writer, server_writer}
        answers = asyncio.create_task(self._answers(server_reader, writer))
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                if self._cut and b"COMMIT\0" in data:
                    if self._cut == "after":
                        # The answer must not get through.
                        answers.cancel()
                        await asyncio.wait([answers])
                        server_writer.write(data)
                        await server_reader.read(1)
                    self._cut, self.is_up = "", False
                    self._hang_up()
                    self.was_cut.set()
                    return
                server_writer.write(data)
        server_writer.close()

    async def _answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
        writer.close()

    def _hang_up(self) -> None:
        for writer in self._pairs:
            writer.close()
        self._pairs.clear()


@pytest.fixture
async def wire(postgres: PostgresServer) -> AsyncIterator[Wire]:
    wire = Wire(postgres.port)
    yield wire
    await wire.close()


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_commit_whose_answer_is_lost(
    make_options: Callable[..., ControllerOptions],
    start: Any,
    postgres: PostgresServer,
    database_url: str,
    wire: Wire,
    when: str,
) -> None:
    """The caller learns which of the two happened; others are not kept waiting meanwhile."""
    through = postgres.url(database_url.rpartition("/")[2], port=await wire.start())
    controller = await start(with_database(make_options(), url=through))
    await controller.create_tenant(ACME, TenantLimits())
    wire.cut_at_commit(when)
    creating = asyncio.create_task(controller.create_tenant("globex", TenantLimits()))
    await wire.was_cut.wait()
    await asyncio.sleep(0.5)
    assert not creating.done()
    async with asyncio.timeout(1):
        with pytest.raises(Unavailable, match="does not answer"):
            await controller.create_tenant("initech", TenantLimits())
    wire.is_up = True
    if when == "after":
        assert (await creating).name == "globex"
    else:
        with pytest.raises(Unavailable):
            await creating
    stored = {ACME, "globex"} if when == "after" else {ACME}
    assert _stored(database_url) == stored
    assert {tenant.name for tenant in (await newest(controller)).tenants} == stored
    await controller.create_tenant("initech", TenantLimits())
    await controller.stop()


async def test_stop_does_not_wait_for_a_commit_in_doubt(
    make_options: Callable[..., ControllerOptions],
    start: Any,
    postgres: PostgresServer,
    database_url: str,
    wire: Wire,
) -> None:
    through = postgres.url(database_url.rpartition("/")[2], port=await wire.start())
    controller = await start(with_database(make_options(), url=through))
    wire.cut_at_commit("after")
    creating = asyncio.create_task(controller.create_tenant(ACME, TenantLimits()))
    await wire.was_cut.wait()
    await asyncio.sleep(0.3)
    async with asyncio.timeout(5):
        await controller.stop()
    with pytest.raises(Unavailable):
        await creating
    again = await start(make_options())
    assert [tenant.name for tenant in (await newest(again)).tenants] == [ACME], "the next one reads what there is"
    await again.stop()
