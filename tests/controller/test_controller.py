"""The controller as gateways, replicas and the deployment see it."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from loraplex.controller.config import ControllerOptions
from loraplex.controller.controller import Controller
from loraplex.core.control import ControlPlane, QuotaShare, ReplicaRoute, TenantDemand
from loraplex.core.errors import (
    BadAdapter,
    BadConfig,
    NotFound,
    Unavailable,
)
from loraplex.core.ids import BaseModelId, ReplicaId, TenantName
from loraplex.core.tenant import Role, TenantLimits, UsageRow
from loraplex.tenancy.keys import hash_key
from loraplex.testing.tiny_adapter import tiny_adapter
from loraplex.traces.schema import encode_batch

from tests.controller.calls import ACME, GATEWAY, GLOBEX, newest, tenants, upload
from tests.database.lock import locked


def _implements(control: ControlPlane) -> ControlPlane:
    """Checked by mypy: the controller has every method of the protocol."""
    return control


async def test_a_change_is_in_the_next_snapshot(controller: Controller) -> None:
    _implements(controller)
    before = await newest(controller)
    await tenants(controller)
    key = await controller.create_key(ACME, Role.MEMBER)
    snapshot = await newest(controller)
    assert snapshot.version > before.version
    assert [view.name for view in snapshot.tenants] == [ACME, GLOBEX]
    assert snapshot.keys == (key.view,)
    assert key.view.key_sha256 == hash_key(key.key)
    assert [view.base_model_id for view in snapshot.base_models] == ["tiny"]
    await controller.update_tenant(ACME, TenantLimits(requests_per_minute=1))
    assert (await newest(controller)).tenants[0].limits.requests_per_minute == 1
    await controller.delete_key(ACME, key.view.key_id)
    assert (await newest(controller)).keys == ()


async def test_long_poll(controller: Controller) -> None:
    first = await newest(controller)
    known = {"after_epoch": first.epoch, "after_version": first.version}
    started = time.monotonic()
    assert await controller.snapshot(**known, timeout_s=0.05) is None
    assert time.monotonic() - started >= 0.05
    waiting = [asyncio.create_task(controller.snapshot(**known, timeout_s=10)) for _ in range(3)]
    await asyncio.sleep(0.01)
    assert not any(task.done() for task in waiting)
    route = ReplicaRoute(replica_id=ReplicaId("r"), base_model_id=BaseModelId("tiny"), address="h:1")
    await controller.set_route(route)
    for snapshot in await asyncio.gather(*waiting):
        assert snapshot is not None
        assert (snapshot.version, snapshot.routes) == (first.version + 1, (route,))
    await controller.set_route(route)
    assert (await newest(controller)).version == first.version + 1, "nothing changed"
    await controller.remove_route(ReplicaId("r"))
    await controller.remove_route(ReplicaId("r"))
    assert (await newest(controller)).routes == ()
    older = await controller.snapshot(after_epoch=first.epoch - 1, after_version=999, timeout_s=0)
    assert older is not None, "a new epoch is newer whatever the version"
    with pytest.raises(Unavailable):
        await controller.snapshot(after_epoch=first.epoch + 1, after_version=0, timeout_s=0)


async def test_bootstrap_is_idempotent(
    make_options: Callable[..., ControllerOptions], start: Any, tmp_path: Path
) -> None:
    directory = tmp_path / "adapter"
    directory.mkdir()
    for filename, data in tiny_adapter().items():
        (directory / filename).write_bytes(data)
    key = "lpx_" + "k" * 40
    seen = []
    for _ in range(2):
        controller = await start(make_options())
        await controller.ensure_tenant("acme", TenantLimits(requests_per_minute=7))
        await controller.ensure_key(ACME, Role.TENANT_ADMIN, key)
        await controller.ensure_adapter(ACME, "pirate", str(directory))
        snapshot = await newest(controller)
        seen.append((snapshot.tenants, snapshot.keys, snapshot.adapters, snapshot.cluster_secret))
        await controller.update_tenant(ACME, TenantLimits(requests_per_minute=7))
        await controller.stop()
        (directory / "adapter_model.safetensors").write_bytes(b"changed, but the name exists")
    assert seen[0] == seen[1]
    controller = await start(make_options())
    assert controller.epoch == 3
    with pytest.raises(BadAdapter, match="nowhere"):
        await controller.ensure_adapter(ACME, "other", "/nowhere")
    await controller.stop()


async def test_deleting_a_tenant_removes_keys_adapters_uploads_usage(controller: Controller) -> None:
    await tenants(controller)
    await controller.create_key(ACME, Role.MEMBER)
    await upload(controller, ACME, "pirate", tiny_adapter())
    upload_id = await controller.begin_upload(ACME, "open")
    await controller.delete_tenant(ACME)
    snapshot = await newest(controller)
    assert [view.name for view in snapshot.tenants] == [GLOBEX]
    assert (snapshot.keys, snapshot.adapters) == ((), ())
    for call in (controller.commit_upload(upload_id), controller.usage(ACME), controller.delete_tenant(ACME)):
        with pytest.raises(NotFound):
            await call


async def test_a_second_controller_fences_out_the_first(
    make_options: Callable[..., ControllerOptions], start: Any
) -> None:
    first = await start(make_options())
    await tenants(first)
    view = await upload(first, ACME, "pirate", tiny_adapter())
    upload_id = await first.begin_upload(ACME, "late")
    second = await start(make_options())
    for call in (
        first.create_tenant("new", TenantLimits()),
        first.create_key(ACME, Role.MEMBER),
        first.report_usage(GATEWAY, (UsageRow(tenant=ACME, requests=1, prompt_tokens=1, output_tokens=1),)),
        first.append_upload(upload_id, "adapter_config.json", b"{}"),
        upload(first, ACME, "pirate", tiny_adapter(seed=9)),
    ):
        with pytest.raises(Unavailable):
            await call
    snapshot = await newest(second)
    assert snapshot.epoch == (await newest(first)).epoch + 1
    assert snapshot.adapters == (view,)
    assert (await second.usage(ACME)).requests == 0
    await first.stop()
    await upload(second, ACME, "pirate", tiny_adapter(seed=9))
    await second.stop()


async def test_usage_traces_and_leases(controller: Controller, traces: Any) -> None:
    await tenants(controller, requests_per_minute=60)
    rows = (UsageRow(tenant=ACME, requests=2, prompt_tokens=20, output_tokens=7),)
    for _ in range(2):
        await controller.report_usage(GATEWAY, rows)
    await controller.report_usage(GATEWAY, ())
    assert await controller.usage(ACME) == UsageRow(tenant=ACME, requests=4, prompt_tokens=40, output_tokens=14)
    batches = [encode_batch((), source="gateway", sequence=n) for n in range(51)]
    await asyncio.gather(*(controller.record_traces(GATEWAY, batch) for batch in batches[:50]))
    assert traces.batches == batches[:50]
    assert (await controller.record_traces(GATEWAY, batches[50])).dropped_rows == 51
    demand = (TenantDemand(tenant=ACME, requests=5, tokens=100, running=1),)
    shares = await controller.lease_quota(GATEWAY, demand, ())
    assert [(row.tenant, row.share) for row in shares] == [("*", 1.0), (ACME, 1.0)]


async def test_after_a_restart_a_gateway_gets_no_more_than_it_held(controller: Controller) -> None:
    await tenants(controller, requests_per_minute=60)
    demand = (TenantDemand(tenant=ACME, requests=5, tokens=100, running=1),)
    held = tuple(QuotaShare(tenant=name, share=0.5) for name in (TenantName("*"), ACME))
    assert await controller.lease_quota(GATEWAY, demand, held) == held


async def test_a_slow_database_does_not_stop_the_event_loop(controller: Controller, database_url: str) -> None:
    with locked(database_url):
        creating = asyncio.create_task(controller.create_tenant("acme", TenantLimits()))
        worst_s = 0.0
        for _ in range(20):
            started = time.perf_counter()
            await asyncio.sleep(0.01)
            assert await newest(controller)
            worst_s = max(worst_s, time.perf_counter() - started)
        assert not creating.done()
        assert worst_s < 0.15
    assert (await creating).name == ACME


@pytest.mark.parametrize("new_database", ["sqlite"], indirect=True)
async def test_start_fails_clearly(
    make_options: Callable[..., ControllerOptions], traces: Any, database_url: str
) -> None:
    options = make_options()
    file = Path(database_url.removeprefix("sqlite:///"))
    file.parent.mkdir(parents=True)
    file.write_bytes(b"garbage " * 100)  # noqa: ASYNC240
    controller = Controller(options, trace_sink=traces)
    with pytest.raises(BadConfig, match=r"control0\.db"):
        await controller.start()
    await controller.stop()
    with pytest.raises(BadConfig, match="approved_url_prefixes"):
        Controller(make_options(approved_url_prefixes=("nonsense",)), trace_sink=traces)
