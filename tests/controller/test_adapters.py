"""Adapters of tenants, from their upload to the end of their files."""

import asyncio
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from loraplex.controller.config import ControllerOptions
from loraplex.controller.controller import Controller
from loraplex.core.errors import (
    BadAdapter,
    Conflict,
    InvalidInput,
    LoraplexError,
    NotFound,
    PayloadTooLarge,
    PermissionDenied,
    RateLimited,
    StorageFull,
)
from loraplex.core.ids import Digest, TenantName
from loraplex.testing.tiny_adapter import tiny_adapter

from tests.controller.calls import ACME, GLOBEX, newest, stored_files, tenants, upload

Files = dict[str, bytes]


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
