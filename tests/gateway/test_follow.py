"""The gateway follows the controller, refuses an older one, and goes on while it is away."""

import asyncio
from dataclasses import replace
from typing import Any

import httpx
from loraplex.core.control import ReplicaRoute
from loraplex.core.ids import BaseModelId, GatewayId, ReplicaId
from loraplex.core.tenant import Role, TenantLimits
from loraplex.core.wire import LoadReport
from loraplex.gateway.config import GatewayConfig
from loraplex.gateway.gateway import Gateway
from loraplex.tenancy.config import TenancyConfig

CHAT = {"model": "pirate", "messages": [{"role": "user", "content": "Hi"}]}


async def test_older_epoch_is_refused(world: Any) -> None:
    view = world.gateway._view
    offered: asyncio.Queue[Any] = asyncio.Queue()

    async def snapshot(**_seen: Any) -> Any:
        return await offered.get()

    world.control.snapshot = snapshot
    await world.control.ensure_tenant("initech", TenantLimits())  # ends the long poll that runs
    held = view.snapshot
    offered.put_nowait(replace(held, epoch=5))
    await world.eventually(lambda: view.snapshot.epoch == 5)
    offered.put_nowait(replace(held, epoch=4, version=99))
    await world.eventually(offered.empty)
    await asyncio.sleep(0.1)
    assert view.snapshot.epoch == 5
    assert b"loraplex_gateway_stale_snapshots_total 0.0" not in world.gateway.metrics.render(per_tenant=True)
    offered.put_nowait(replace(held, epoch=6))
    await world.eventually(lambda: view.snapshot.epoch == 6)


async def test_serves_and_keeps_usage_while_the_controller_is_away(world: Any) -> None:
    world.control.away = True
    await asyncio.sleep(0.1)
    assert (await world.http.post("/v1/chat/completions", json=CHAT)).status_code == 200
    await asyncio.sleep(0.1)
    assert not world.control.rows_of("report_usage")
    world.control.away = False
    await world.eventually(lambda: world.control.rows_of("report_usage"))
    assert sum(row.requests for row in world.control.rows_of("report_usage")) == 1


async def test_a_database_that_does_not_answer_holds_up_no_lease(world: Any) -> None:
    """The controller writes usage to it; leases it answers from memory."""
    asked = asyncio.Event()

    async def hangs(*_args: Any) -> None:
        asked.set()
        await asyncio.Event().wait()

    world.control.report_usage = hangs
    assert (await world.http.post("/v1/chat/completions", json=CHAT)).status_code == 200
    await asked.wait()
    before = [name for name, _ in world.control.calls].count("lease_quota")
    await world.eventually(lambda: [name for name, _ in world.control.calls].count("lease_quota") > before + 2)
    del world.control.report_usage


async def test_limits_and_demand(world: Any) -> None:
    await world.control.update_tenant("acme", TenantLimits(requests_per_minute=1))
    await world.eventually(lambda: world.gateway._view.directory.tenant("acme").limits.requests_per_minute == 1)
    statuses = [(await world.http.post("/v1/chat/completions", json=CHAT)).status_code for _ in range(3)]
    assert statuses == [200, 429, 429]
    reply = await world.http.post("/v1/chat/completions", json=CHAT)
    assert reply.json()["error"]["code"] == "rate_limit_exceeded"
    assert int(reply.headers["retry-after"]) >= 1
    await world.eventually(lambda: sum(row.requests for row in world.control.rows_of("lease_quota")) == 4)
    assert [row.status for row in world.tracer.rows] == [200, 429, 429, 429]
    assert [row.prompt_tokens > 0 for row in world.tracer.rows] == [True, False, False, False]
    assert len(world.tracer.arrivals) == 1, "what its quota does not allow a tenant is no load"
    leases = [args for name, args in world.control.calls if name == "lease_quota"]
    assert leases[0][2] == ()
    assert [row.share for row in leases[-1][2]][:1] == [1.0], "each lease reports the answer to the one before"
    async with world.client("lpx_globex_admin_key_of_the_tests") as other:
        assert (await other.post("/v1/chat/completions", json={**CHAT, "model": "lawyer"})).status_code == 200


async def test_routes_are_handed_on_and_loads_shown(world: Any) -> None:
    seen: list[Any] = []
    loads: dict[ReplicaId, LoadReport] = {}
    gateway = Gateway(
        GatewayConfig(),
        gateway_id=GatewayId("gw-2"),
        control=world.control,
        dispatcher=world.dispatcher,
        tracer=world.tracer,
        on_routes=lambda routes, secret: seen.append((routes, secret)),
        loads=lambda: loads,
    )
    await gateway.start()
    try:
        assert seen == [(world.gateway._view.snapshot.routes, world.control.controller.cluster_secret)]
        await world.eventually(lambda: gateway.not_ready() == "No replica is up.")
        routes = world.control.controller._board.current.routes
        world.control.controller._board.set_routes(routes, asleep=True)
        await world.eventually(lambda: gateway.not_ready() is None)
        world.control.controller._board.set_routes(routes, asleep=False)
        await world.eventually(lambda: gateway.not_ready() == "No replica is up.")
        loads[ReplicaId("fake-0")] = LoadReport(num_running=3)
        assert gateway.not_ready() is None
        route = ReplicaRoute(replica_id=ReplicaId("r2"), base_model_id=BaseModelId("tiny-base"), address="h:2")
        await world.control.set_route(route)
        await world.eventually(lambda: len(seen) == 2)
        await world.control.create_key("acme", Role.MEMBER)
        await asyncio.sleep(0.1)
        assert len(seen) == 2
    finally:
        await gateway.stop()


async def test_metrics_tell_of_dropped_traces_and_of_the_queue(world: Any) -> None:
    gateway = Gateway(
        GatewayConfig(),
        gateway_id=GatewayId("gw-2"),
        control=world.control,
        dispatcher=world.dispatcher,
        tracer=world.tracer,
        num_queued=lambda: 3,
    )
    world.tracer.num_dropped = 4
    transport = httpx.ASGITransport(app=gateway.http_app)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        text = (await client.get("/metrics")).text
    assert 'loraplex_trace_recorder_rows_total{outcome="dropped"} 4.0' in text
    assert "loraplex_gateway_queued_generations 3.0" in text


async def test_start_returns_while_the_controller_is_away(world: Any) -> None:
    world.control.away = True
    gateway = Gateway(
        GatewayConfig(retry_min_s=0.01, retry_max_s=0.05),
        tenancy=TenancyConfig(slice_s=0.05),
        gateway_id=GatewayId("gw-3"),
        control=world.control,
        dispatcher=world.dispatcher,
        tracer=world.tracer,
    )
    await gateway.start(wait_s=0.1)
    assert gateway.not_ready() == "No snapshot of the cluster yet."
    world.control.away = False
    await world.eventually(lambda: gateway.not_ready() is None)
    await gateway.stop()
