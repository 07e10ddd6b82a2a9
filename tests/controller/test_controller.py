"""The controller as gateways, replicas and the deployment see it."""

import asyncio
import errno
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from loraplex.controller.config import ControllerOptions
from loraplex.controller.controller import Controller
from loraplex.core.control import ControlPlane, ControlSnapshot, QuotaShare, ReplicaRoute, TenantDemand
from loraplex.core.errors import (
    BadAdapter,
    BadConfig,
    Conflict,
    InvalidInput,
    LoraplexError,
    NotFound,
    PayloadTooLarge,
    PermissionDenied,
    RateLimited,
    StorageFull,
    Unavailable,
)
from loraplex.core.ids import BaseModelId, Digest, GatewayId, ReplicaId, TenantName
from loraplex.core.tenant import Role, TenantLimits, UsageRow
from loraplex.tenancy.keys import hash_key
from loraplex.testing.tiny_adapter import tiny_adapter
from loraplex.testing.tiny_controller import upload_adapter
from loraplex.traces.schema import encode_batch

from tests.database.lock import locked

ACME, GLOBEX = TenantName("acme"), TenantName("globex")
GATEWAY = GatewayId("gateway-1")
Files = dict[str, bytes]


def _implements(control: ControlPlane) -> ControlPlane:
    """Checked by mypy: the controller has every method of the protocol."""
    return control


upload = partial(upload_adapter, piece_bytes=500)


async def newest(control: ControlPlane) -> ControlSnapshot:
    snapshot = await control.snapshot(after_epoch=0, after_version=0, timeout_s=0)
    assert snapshot is not None
    return snapshot


async def tenants(controller: Controller, **limits: int) -> None:
    for name in (ACME, GLOBEX):
        await controller.create_tenant(name, TenantLimits(**limits))


def stored_files(options: ControllerOptions) -> list[Path]:
    return [path for path in (options.data_dir / "artifacts").rglob("*") if path.is_file()]


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


async def test_upload_versions_rollback_delete(
    controller: Controller, make_options: Callable[..., ControllerOptions]
) -> None:
    await tenants(controller)
    first = await upload(controller, ACME, "pirate", tiny_adapter(seed=1))
    second = await upload(controller, ACME, "pirate", tiny_adapter(seed=2, lora_rank=8))
    assert (first.ref.version, second.ref.version, second.max_lora_rank, second.current) == (1, 2, 8, True)
    snapshot = await newest(controller)
    assert [(view.ref.version, view.current) for view in snapshot.adapters] == [(1, False), (2, True)]
    assert snapshot.tenants[0].num_adapters == 1
    assert snapshot.tenants[0].adapter_bytes == first.num_bytes + second.num_bytes
    assert (await controller.set_current(ACME, "pirate", 1)).current
    with pytest.raises(Conflict):
        await controller.delete_adapter(ACME, "pirate", 1)
    await controller.delete_adapter(ACME, "pirate", 2)
    await controller.delete_adapter(ACME, "pirate", None)
    assert (await newest(controller)).adapters == ()
    info = await controller.artifact(first.ref.digest)
    assert info.url in map(str, stored_files(make_options())), "replicas may still need it"


async def test_two_tenants_with_the_same_files_share_nothing_that_shows(controller: Controller) -> None:
    await tenants(controller)
    ours, theirs = [await upload(controller, name, "pirate", tiny_adapter()) for name in (ACME, GLOBEX)]
    assert ours.ref.digest != theirs.ref.digest
    assert (await controller.artifact(ours.ref.digest)).url != (await controller.artifact(theirs.ref.digest)).url
    again = await upload(controller, ACME, "pirate", tiny_adapter())
    assert again == ours
    copy = await upload(controller, ACME, "copy", tiny_adapter())
    assert copy.ref.digest == ours.ref.digest
    for call in (
        controller.delete_adapter(GLOBEX, "copy", None),
        controller.set_current(GLOBEX, "copy", 1),
    ):
        with pytest.raises(NotFound, match="no adapter 'copy'"):
            await call


async def test_artifact_pieces(controller: Controller) -> None:
    await tenants(controller)
    files = tiny_adapter()
    digest = (await upload(controller, ACME, "pirate", files)).ref.digest
    got = b""
    while piece := await controller.read_artifact(digest, offset=len(got), max_bytes=100):
        assert len(piece) <= 100
        got += piece
    assert got == files["adapter_model.safetensors"]
    for bad in (Digest("0" * 64), Digest("../" * 10), Digest("x/" + "0" * 62)):
        with pytest.raises(NotFound):
            await controller.read_artifact(bad, offset=0, max_bytes=100)
    with pytest.raises(NotFound):
        await controller.read_artifact(digest, offset=-1, max_bytes=100)


async def test_a_refused_adapter_leaves_nothing(
    controller: Controller, make_options: Callable[..., ControllerOptions]
) -> None:
    await tenants(controller)
    before = await newest(controller)
    files = tiny_adapter()
    bad: list[tuple[Files, str]] = [
        (tiny_adapter(lora_rank=300), "r is 300"),
        (tiny_adapter(hidden_size=32), "wrong base model"),
        (files | {"adapter_model.safetensors": files["adapter_model.safetensors"][:-4]}, "truncated"),
        ({"adapter_config.json": files["adapter_config.json"]}, "missing"),
    ]
    for broken, message in bad:
        with pytest.raises(BadAdapter, match=message):
            await upload(controller, ACME, "pirate", broken)
    assert await newest(controller) == before
    assert stored_files(make_options()) == []
    assert list((make_options().data_dir / "uploads").iterdir()) == []


async def test_upload_errors(make_options: Callable[..., ControllerOptions], start: Any) -> None:
    controller = await start(make_options(max_config_bytes=10, max_open_uploads=2))
    await tenants(controller)
    for name in ("../x", "", "tiny"):
        with pytest.raises(InvalidInput):
            await controller.begin_upload(ACME, name)
    with pytest.raises(NotFound):
        await controller.begin_upload(TenantName("nobody"), "x")
    first = await controller.begin_upload(ACME, "x")
    with pytest.raises(PayloadTooLarge):
        await controller.append_upload(first, "adapter_config.json", b"x" * 11)
    with pytest.raises(BadAdapter, match="pickle"):
        await controller.append_upload(first, "adapter_model.bin", b"x")
    await controller.begin_upload(ACME, "y")
    with pytest.raises(RateLimited, match="2 uploads open"):
        await controller.begin_upload(ACME, "z")
    await controller.begin_upload(GLOBEX, "z")
    await controller.abort_upload(first)
    await controller.abort_upload(first)
    for call in (controller.append_upload(first, "adapter_config.json", b""), controller.commit_upload(first)):
        with pytest.raises(NotFound, match="no such upload"):
            await call
    await controller.begin_upload(ACME, "z")
    await controller.stop()
    assert list((make_options().data_dir / "uploads").iterdir()) == []


async def test_uploads_that_begin_at_one_time_share_the_limit(
    make_options: Callable[..., ControllerOptions], start: Any
) -> None:
    controller = await start(make_options(max_open_uploads=2))
    await tenants(controller)
    begun = await asyncio.gather(*(controller.begin_upload(ACME, f"a{i}") for i in range(8)), return_exceptions=True)
    assert sum(isinstance(result, str) for result in begun) == 2
    assert sum(isinstance(result, RateLimited) for result in begun) == 6
    await controller.stop()


async def test_adapter_limits(controller: Controller, make_options: Callable[..., ControllerOptions]) -> None:
    await tenants(controller, max_adapters=1, max_adapter_bytes=3 * len(tiny_adapter()["adapter_model.safetensors"]))
    open_before = await controller.begin_upload(ACME, "late")
    await upload(controller, ACME, "pirate", tiny_adapter())
    with pytest.raises(RateLimited, match="limit of 1 adapters"):
        await controller.begin_upload(ACME, "other")
    for filename, data in tiny_adapter(seed=5).items():
        await controller.append_upload(open_before, filename, data)
    with pytest.raises(RateLimited, match="limit of 1 adapters"):
        await controller.commit_upload(open_before)
    assert len(stored_files(make_options())) == 1, "the refused one is not kept"
    for seed in (1, 2):
        await upload(controller, ACME, "pirate", tiny_adapter(seed=seed))
    with pytest.raises(RateLimited, match="bytes"):
        await upload(controller, ACME, "pirate", tiny_adapter(seed=3))
    assert len(stored_files(make_options())) == 3


async def test_a_caller_who_gives_up_does_not_stop_a_commit(controller: Controller) -> None:
    await tenants(controller)
    upload_id = await controller.begin_upload(ACME, "pirate")
    for filename, data in tiny_adapter().items():
        await controller.append_upload(upload_id, filename, data)
    commit = asyncio.create_task(controller.commit_upload(upload_id))
    await asyncio.sleep(0)
    commit.cancel()
    with pytest.raises(asyncio.CancelledError):
        await commit
    known = await newest(controller)
    if not known.adapters:
        await controller.snapshot(after_epoch=known.epoch, after_version=known.version, timeout_s=5)
    assert len((await newest(controller)).adapters) == 1


async def test_a_full_disk_is_told_and_nothing_is_half_registered(
    controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    await tenants(controller)

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageFull):
            await upload(controller, ACME, "pirate", tiny_adapter())
    assert (await newest(controller)).adapters == ()
    await upload(controller, ACME, "pirate", tiny_adapter())


async def test_register_url(make_options: Callable[..., ControllerOptions], start: Any, tmp_path: Path) -> None:
    approved = tmp_path / "approved"
    (approved / "one").mkdir(parents=True)
    for filename, data in tiny_adapter().items():
        (approved / "one" / filename).write_bytes(data)
    controller = await start(make_options(approved_url_prefixes=(f"file://{approved}",)))
    await tenants(controller)
    view = await controller.register_url(ACME, "pirate", f"file://{approved}/one")
    assert view == (await newest(controller)).adapters[0]
    denied: list[tuple[str, type[LoraplexError]]] = [
        (f"file://{tmp_path}/elsewhere", PermissionDenied),
        (f"file://{approved}/../elsewhere", InvalidInput),
        (f"file://{approved}/two", NotFound),
    ]
    for url, error in denied:
        with pytest.raises(error):
            await controller.register_url(ACME, "other", url)
    assert list((make_options().data_dir / "uploads").iterdir()) == []
    await controller.stop()


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


async def test_files_of_deleted_adapters_go_after_the_grace(
    make_options: Callable[..., ControllerOptions], start: Any
) -> None:
    options = make_options(deleted_grace_s=0.3, sweep_interval_s=0.05, upload_idle_s=0.1)
    controller = await start(options)
    await tenants(controller)
    gone = await upload(controller, ACME, "gone", tiny_adapter(seed=1))
    kept = await upload(controller, ACME, "kept", tiny_adapter(seed=2))
    idle = await controller.begin_upload(ACME, "idle")
    await controller.delete_adapter(ACME, "gone", None)
    await asyncio.sleep(0.1)
    assert len(stored_files(options)) == 2
    for _ in range(250):
        if len(stored_files(options)) == 1:
            break
        await asyncio.sleep(0.02)
    with pytest.raises(NotFound):
        await controller.artifact(gone.ref.digest)
    assert [str(path) for path in stored_files(options)] == [(await controller.artifact(kept.ref.digest)).url]
    with pytest.raises(NotFound):
        await controller.commit_upload(idle)
    await controller.stop()


async def test_start_collects_files_without_a_row(make_options: Callable[..., ControllerOptions], start: Any) -> None:
    options = make_options()
    controller = await start(options)
    await tenants(controller)
    await upload(controller, ACME, "kept", tiny_adapter())
    await controller.stop()
    (orphan,) = [path.with_name(f"{'0' * 64}.safetensors") for path in stored_files(options)]
    orphan = options.data_dir / "artifacts" / "00" / orphan.name
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(b"crashed before its row was written")
    controller = await start(options)
    assert len(stored_files(options)) == 1
    assert not orphan.exists()
    await controller.stop()


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
