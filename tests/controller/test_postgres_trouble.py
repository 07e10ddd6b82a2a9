"""A PostgreSQL server that is there and of no use (silent, or its disk full), and one that is away for a minute: what
the controller answers, and that it goes on afterwards in the same epoch."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import psycopg
import pytest
from loraplex.controller.config import ControllerOptions
from loraplex.controller.controller import Controller
from loraplex.core.control import TenantDemand
from loraplex.core.errors import StorageFull, Unavailable
from loraplex.core.tenant import TenantLimits, UsageRow

from tests.controller.calls import ACME, GATEWAY, newest, with_database
from tests.database.postgres import PostgresServer
from tests.database.relay import Relay

pytestmark = [pytest.mark.alone, pytest.mark.parametrize("new_database", ["postgresql"], indirect=True)]
LIMITED = TenantLimits(requests_per_minute=60)
USAGE = (UsageRow(tenant=ACME, requests=1, prompt_tokens=2, output_tokens=3),)
_FULL = """
CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS
  $$ BEGIN RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = '53100'; END $$;
CREATE {trigger}
"""
_AT_ONCE = "TRIGGER full_disk BEFORE INSERT ON tenants EXECUTE FUNCTION full_disk();"
_AT_COMMIT = """CONSTRAINT TRIGGER full_disk AFTER INSERT ON tenants DEFERRABLE INITIALLY DEFERRED FOR EACH ROW
  EXECUTE FUNCTION full_disk();"""


async def _names(controller: Controller) -> list[str]:
    return [tenant.name for tenant in (await newest(controller)).tenants]


async def _serves_as_before(controller: Controller) -> None:
    """What requests need: the snapshot and their quota."""
    assert await _names(controller) == [ACME]
    demand = (TenantDemand(tenant=ACME, requests=5, tokens=100, running=1),)
    assert {share.tenant for share in await controller.lease_quota(GATEWAY, demand, ())} == {"*", ACME}


async def _is_well(controller: Controller) -> None:
    """Waits until a change succeeds. What could not be reported before has not been counted."""
    async with asyncio.timeout(30):
        while True:
            try:
                await controller.create_tenant("globex", TenantLimits())
                break
            except Unavailable:
                await asyncio.sleep(0.05)
    assert await _names(controller) == [ACME, "globex"]
    await controller.report_usage(GATEWAY, USAGE)
    assert (await controller.usage(ACME)).output_tokens == 3
    assert controller.epoch == 1


@pytest.fixture
async def relay(postgres: PostgresServer) -> AsyncIterator[Relay]:
    relay = Relay(postgres.port)
    yield relay
    relay.close()


async def test_a_silent_server(
    make_options: Callable[..., ControllerOptions],
    start: Any,
    postgres: PostgresServer,
    database_url: str,
    relay: Relay,
) -> None:
    through = postgres.url(database_url.rpartition("/")[2], port=relay.port)
    limits = {"busy_timeout_s": 0.5, "connect_timeout_s": 2.0, "answer_timeout_s": 2.0}
    controller = await start(with_database(make_options(), url=through, **limits))
    await controller.create_tenant(ACME, LIMITED)
    relay.fall_silent()
    # All that come meanwhile wait for one time-out together, and not one after the other.
    started_s = time.monotonic()
    calls = [controller.create_tenant(f"tenant-{number}", TenantLimits()) for number in range(5)]
    results = await asyncio.gather(*calls, controller.report_usage(GATEWAY, USAGE), return_exceptions=True)
    assert time.monotonic() - started_s < 7.0
    assert [type(result) for result in results] == [Unavailable] * 6
    started_s = time.monotonic()
    for _ in range(10):
        with pytest.raises(Unavailable, match="does not answer"):
            await controller.create_tenant("globex", TenantLimits())
        await _serves_as_before(controller)
    assert time.monotonic() - started_s < 1.0
    relay.speak()
    await _is_well(controller)
    await controller.stop()


@pytest.mark.parametrize("trigger", [_AT_ONCE, _AT_COMMIT], ids=["in a statement", "at the commit"])
async def test_a_full_disk(controller: Controller, database_url: str, trigger: str) -> None:
    await controller.create_tenant(ACME, LIMITED)
    with psycopg.connect(database_url) as connection:
        connection.execute(_FULL.format(trigger=trigger))
    for _ in range(3):
        with pytest.raises(StorageFull, match="disk of the control database is full"):
            await controller.create_tenant("globex", TenantLimits())
        await _serves_as_before(controller)
    with psycopg.connect(database_url) as connection:
        connection.execute("DROP TRIGGER full_disk ON tenants")
    await _is_well(controller)


@pytest.mark.slow
@pytest.mark.timeout(150)
async def test_away_for_a_minute(controller: Controller, postgres: PostgresServer) -> None:
    await controller.create_tenant(ACME, LIMITED)
    await asyncio.to_thread(postgres.stop)
    try:
        back_s = time.monotonic() + 60
        while time.monotonic() < back_s:
            for change in (
                controller.create_tenant("globex", TenantLimits()),
                controller.report_usage(GATEWAY, USAGE),
                controller.delete_tenant(ACME),
            ):
                with pytest.raises(Unavailable, match="does not answer"):
                    await change
            await _serves_as_before(controller)
            await asyncio.sleep(1)
    finally:
        await asyncio.to_thread(postgres.start)
    await _is_well(controller)
