"""Everything on S3: an adapter is registered, a replica's node fetches it, the trace of its requests is written and
read; the store goes away and comes back; keys of the store appear nowhere."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from loraplex.controller.config import ControllerOptions
from loraplex.controller.controller import Controller
from loraplex.core.control import ArtifactInfo
from loraplex.core.errors import BadAdapter, BadConfig, NotFound, Unavailable
from loraplex.core.ids import Digest, TenantName
from loraplex.core.tenant import TenantLimits
from loraplex.registry.cache import NodeCache
from loraplex.registry.config import RegistryConfig
from loraplex.testing.tiny_adapter import tiny_adapter
from loraplex.testing.tiny_controller import upload_adapter

from tests.object_storage.s3 import SECRET_KEY, S3Server

pytestmark = pytest.mark.parametrize("new_database", ["sqlite"], indirect=True)
ACME = TenantName("acme")


class Node:
    """A replica's node cache over calls of the controller, as its staging threads make them."""

    def __init__(self, controller: Controller, directory: Path, *, storage_retry_s: float = 20.0) -> None:
        self._controller, self._loop = controller, asyncio.get_running_loop()
        config = RegistryConfig(storage_retry_s=storage_retry_s, piece_bytes=1000)
        self._cache = NodeCache(config, directory=directory, reader=self)

    def info(self, digest: Digest) -> ArtifactInfo:
        return asyncio.run_coroutine_threadsafe(self._controller.artifact(digest), self._loop).result()

    def read(self, digest: Digest, *, offset: int, max_bytes: int) -> bytes:
        raise AssertionError("what has a URL is not read through the controller")

    async def fetch(self, digest: Digest) -> bytes:
        return await asyncio.to_thread(self._fetch, digest)

    def _fetch(self, digest: Digest) -> bytes:
        with self._cache.open(digest) as (_, path):
            return Path(path).read_bytes()


async def test_register_fetch_delete(
    make_options: Callable[..., ControllerOptions],
    start: Any,
    s3: S3Server,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, logger="loraplex")
    source = s3.url("tuned/models")
    url = s3.url("adapters/all")
    options = make_options(
        artifact_url=url,
        approved_url_prefixes=(source.replace("tuned/models", "tuned/models/{tenant}"),),
        deleted_grace_s=0.001,
    )
    controller = await start(options)
    await controller.create_tenant(ACME, TenantLimits())
    uploaded = await upload_adapter(controller, ACME, "uploaded", tiny_adapter(1))
    for name, content in tiny_adapter(2).items():
        s3.write(f"tuned/models/acme/two/{name}", content)
    by_url = await controller.register_url(ACME, "by-url", "s3://tuned/models/acme/two")
    with pytest.raises(NotFound):
        await controller.register_url(ACME, "none", "s3://tuned/models/acme/none")
    files = {f"adapters/all/{view.ref.digest}.safetensors": view for view in (uploaded, by_url)}
    assert s3.names("adapters/all") == sorted(files)

    node = Node(controller, tmp_path / "cache")
    assert await node.fetch(uploaded.ref.digest) == tiny_adapter(1)["adapter_model.safetensors"]
    assert await node.fetch(by_url.ref.digest) == tiny_adapter(2)["adapter_model.safetensors"]
    assert (
        await controller.read_artifact(by_url.ref.digest, offset=8, max_bytes=4)
        == (tiny_adapter(2)["adapter_model.safetensors"][8:12])
    )
    await controller.stop()

    s3.write("adapters/all/tmp-of-a-dead-upload", b"x")
    again = await start(options)
    assert s3.names("adapters/all") == sorted(files), "what a crash left is collected"
    await again.delete_adapter(ACME, "uploaded", None)
    await asyncio.sleep(0.01)
    await again._adapters.sweep()
    assert s3.names("adapters/all") == [f"adapters/all/{by_url.ref.digest}.safetensors"]
    await again.stop()
    assert SECRET_KEY not in caplog.text


async def test_a_damaged_object_is_not_served(
    make_options: Callable[..., ControllerOptions], start: Any, s3: S3Server, tmp_path: Path
) -> None:
    controller = await start(make_options(artifact_url=s3.url("damaged/all")))
    await controller.create_tenant(ACME, TenantLimits())
    view = await upload_adapter(controller, ACME, "one", tiny_adapter(1))
    (name,) = s3.names("damaged/all")
    content = s3.read(name)
    s3.write(name, content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BadAdapter, match="damaged"):
        await Node(controller, tmp_path / "cache").fetch(view.ref.digest)
    s3.write(name, content)
    assert await Node(controller, tmp_path / "cache").fetch(view.ref.digest) == content
    await controller.stop()


async def test_the_store_is_away_for_a_while(
    make_options: Callable[..., ControllerOptions],
    start: Any,
    s3: S3Server,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Shorter than the retries last: nobody notices but by the wait. Longer: 503, nothing half-done, and all is well
    once it is back."""
    controller = await start(make_options(artifact_url=s3.url("away/all"), storage_retry_s=60.0))
    await controller.create_tenant(ACME, TenantLimits())
    node = Node(controller, tmp_path / "cache", storage_retry_s=60.0)
    first = await upload_adapter(controller, ACME, "first", tiny_adapter(1))
    s3.gate.shut()
    try:
        uploading = asyncio.create_task(upload_adapter(controller, ACME, "second", tiny_adapter(2)))
        fetching = asyncio.create_task(node.fetch(first.ref.digest))
        await asyncio.sleep(2.5)
        assert not uploading.done()
        assert not fetching.done()
        snapshot = await controller.snapshot(after_epoch=0, after_version=0, timeout_s=0)
        assert [view.ref.name for view in snapshot.adapters] == ["first"], "the controller works meanwhile"
    finally:
        s3.gate.open()
    assert await fetching == tiny_adapter(1)["adapter_model.safetensors"]
    second = await uploading
    assert await node.fetch(second.ref.digest) == tiny_adapter(2)["adapter_model.safetensors"]
    assert "trying again" in caplog.text
    await controller.stop()

    impatient = await start(make_options(artifact_url=s3.url("away/all"), storage_retry_s=0.5))
    before = s3.names("away/all")
    s3.gate.shut()
    try:
        with pytest.raises(Unavailable) as caught:
            await upload_adapter(impatient, ACME, "third", tiny_adapter(3))
        assert caught.value.message == "cannot write the adapter", "no host and no key for tenants"
        with pytest.raises(Unavailable, match="the artifact store does not answer"):
            await Node(impatient, tmp_path / "other-cache", storage_retry_s=0.5).fetch(first.ref.digest)
    finally:
        s3.gate.open()
    assert s3.names("away/all") == before
    await upload_adapter(impatient, ACME, "third", tiny_adapter(3))
    assert len(s3.names("away/all")) == 3
    await impatient.stop()
    assert SECRET_KEY not in caplog.text


async def test_an_unusable_store_is_a_clear_error(
    make_options: Callable[..., ControllerOptions], start: Any, s3: S3Server, tmp_path: Path
) -> None:
    with pytest.raises(BadConfig, match="cannot read credentials_file"):
        await start(make_options(artifact_url=f"s3://x/y?region=r&credentials_file={tmp_path}/nowhere"))
    s3.gate.shut()
    try:
        with pytest.raises(Unavailable, match="artifact store"):
            await start(make_options(artifact_url=s3.url("unusable/all"), storage_retry_s=0.2))
    finally:
        s3.gate.open()
