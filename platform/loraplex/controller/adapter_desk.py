"""Takes adapters in and hands artifacts out: uploads, registration by URL, publishing, reading, sweeping.

Owns the open uploads and the order of things that makes a crash harmless: check the staged files, store the artifact,
then commit the database. A file without a row is collected at the next start; a row without a file cannot be. Files are
removed in the opposite order, and only when nothing has named them for the grace time: a replica may still fetch what a
gateway's older snapshot led it to. Event loop only; blocking work goes to the threads that it is given.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from loraplex.controller.catalog_thread import CatalogThread
from loraplex.core.clock import Clock
from loraplex.core.control import AdapterView, ArtifactInfo
from loraplex.core.errors import BadAdapter, LoraplexError, NotFound, RateLimited, StorageFull, Unavailable
from loraplex.core.ids import BaseModelId, Digest, TenantName
from loraplex.core.model import ModelSpec
from loraplex.object_storage.retry import Retry
from loraplex.registry.config import RegistryConfig
from loraplex.registry.intake import CheckedAdapter, check_adapter
from loraplex.registry.lora_config import CONFIG_FILE
from loraplex.registry.names import check_adapter_name
from loraplex.registry.sources import fetch_adapter, parse_prefixes
from loraplex.registry.staging import StagingArea
from loraplex.registry.store import ArtifactStore, open_store, translated_disk_errors
from loraplex.registry.tensors_file import TENSORS_FILE

R = TypeVar("R")

logger = logging.getLogger(__name__)


class _Upload:
    """One open upload. ``lock`` orders its appends and its end."""

    __slots__ = ("lock", "name", "tenant", "used_s")

    def __init__(self, tenant: TenantName, name: str, now_s: float) -> None:
        self.tenant = tenant
        self.name = name
        self.used_s = now_s
        self.lock = asyncio.Lock()


class AdapterDesk:
    def __init__(
        self,
        config: RegistryConfig,
        *,
        data_dir: Path,
        catalog: CatalogThread,
        io_threads: ThreadPoolExecutor,
        clock: Clock,
    ) -> None:
        """Raises BadConfig."""
        self._config = config
        self._data_dir = data_dir
        self._catalog = catalog
        self._io_threads = io_threads
        self._clock = clock
        self._prefixes = parse_prefixes(config.approved_url_prefixes)
        self._bases: Mapping[BaseModelId, ModelSpec] = {}
        self._uploads: dict[str, _Upload] = {}
        # Held from counting a tenant's uploads to the entry of one more.
        self._beginning = asyncio.Lock()
        # Held while a file and its row are not both there (or both gone).
        self._publishing = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def open(self) -> None:
        """Clears staging, removes files without a row and artifacts whose grace is over.

        Raises BadConfig, StorageFull, Unavailable.
        """
        self._staging: StagingArea = await self._io(StagingArea, self._data_dir / "uploads", self._config)
        url = self._config.artifact_url or str(self._data_dir / "artifacts")
        self._store: ArtifactStore = await self._io(
            partial(open_store, url, retry=Retry(total_s=self._config.storage_retry_s))
        )
        referenced = await self._catalog.read(lambda catalog: catalog.artifact_digests())
        left = await self._io(self._store.collect, referenced)
        if left.kept:
            logger.warning(
                "the database knows no adapter, yet %s holds %d artifacts: they stay; restore the database or empty it",
                url,
                left.kept,
            )
        await self.sweep()

    async def close(self) -> None:
        """Waits for what is being published; open uploads are dropped."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for upload_id in list(self._uploads):
            await self.abort(upload_id)

    def set_bases(self, bases: Mapping[BaseModelId, ModelSpec]) -> None:
        self._bases = dict(bases)

    async def begin(self, tenant: TenantName, name: str) -> str:
        check_adapter_name(name, self._bases)
        await self._catalog.read(lambda catalog: catalog.check_room(tenant, name, extra_bytes=0))
        async with self._beginning:
            if sum(upload.tenant == tenant for upload in self._uploads.values()) >= self._config.max_open_uploads:
                raise RateLimited(
                    f"the tenant has {self._config.max_open_uploads} uploads open; finish or abort one first",
                    retry_after_s=1.0,
                    code="upload_limit_exceeded",
                )
            upload_id = await self._io(self._staging.create)
            self._uploads[upload_id] = _Upload(tenant, name, self._clock.monotonic_s())
        return upload_id

    async def append(self, upload_id: str, filename: str, data: bytes) -> None:
        await self._to_the_end(self._append(upload_id, filename, data))

    async def commit(self, upload_id: str) -> AdapterView:
        """The upload is over afterwards, whatever the outcome."""
        return await self._to_the_end(self._commit(upload_id))

    async def abort(self, upload_id: str) -> None:
        """Idempotent."""
        upload = self._uploads.get(upload_id)
        if upload is not None:
            async with upload.lock:
                await self._drop(upload_id)

    async def abort_tenant(self, tenant: TenantName) -> None:
        for upload_id in [key for key, upload in self._uploads.items() if upload.tenant == tenant]:
            await self.abort(upload_id)

    async def register_url(self, tenant: TenantName, name: str, url: str) -> AdapterView:
        def copy(append: Callable[[str, bytes], None]) -> None:
            fetch_adapter(url, self._prefixes, tenant, append)

        return await self._to_the_end(self._register(tenant, name, copy))

    async def register_directory(self, tenant: TenantName, name: str, directory: Path) -> AdapterView:
        """Copies a PEFT directory of this machine; the caller vouches for the path."""

        def copy(append: Callable[[str, bytes], None]) -> None:
            for filename in (CONFIG_FILE, TENSORS_FILE):
                try:
                    with (directory / filename).open("rb") as file:
                        while piece := file.read(self._config.piece_bytes):
                            append(filename, piece)
                except OSError as error:
                    raise BadAdapter(f"{directory / filename}: {error.strerror}", param=filename) from error

        return await self._to_the_end(self._register(tenant, name, copy))

    async def artifact(self, digest: Digest) -> ArtifactInfo:
        stored = await self._catalog.read(lambda catalog: catalog.artifact(digest))
        return ArtifactInfo(manifest=stored.manifest, url=self._store.url(digest), content_sha256=stored.content_sha256)

    async def read_artifact(self, digest: Digest, *, offset: int, max_bytes: int) -> bytes:
        if len(digest) != 64 or not digest.isalnum() or offset < 0 or max_bytes < 1:
            raise NotFound(f"no artifact {digest[:80]!r} with such a piece")
        return await self._io(self._store.read, digest, offset, min(max_bytes, self._config.piece_bytes))

    async def sweep(self) -> None:
        """Drops idle uploads, and artifacts whose grace is over."""
        idle_before_s = self._clock.monotonic_s() - self._config.upload_idle_s
        for upload_id, upload in list(self._uploads.items()):
            if upload.used_s < idle_before_s and not upload.lock.locked():
                await self.abort(upload_id)
        async with self._publishing:
            grace_s = self._config.deleted_grace_s
            await self._catalog.read(lambda catalog: catalog.forget_artifacts(grace_s, self._store.remove))

    async def _append(self, upload_id: str, filename: str, data: bytes) -> None:
        upload = self._upload(upload_id)
        async with upload.lock:
            self._upload(upload_id)
            upload.used_s = self._clock.monotonic_s()
            await self._io(self._staging.append, upload_id, filename, data)

    async def _register(
        self, tenant: TenantName, name: str, copy: Callable[[Callable[[str, bytes], None]], None]
    ) -> AdapterView:
        upload_id = await self.begin(tenant, name)
        try:
            async with self._upload(upload_id).lock:
                await self._io(copy, partial(self._staging.append, upload_id))
            return await self._commit(upload_id)
        finally:
            await self.abort(upload_id)

    async def _commit(self, upload_id: str) -> AdapterView:
        upload = self._upload(upload_id)
        async with upload.lock:
            self._upload(upload_id)
            try:
                return await self._publish(upload.tenant, upload.name, self._staging.path(upload_id))
            finally:
                await self._drop(upload_id)

    async def _publish(self, tenant: TenantName, name: str, directory: Path) -> AdapterView:
        check_adapter_name(name, self._bases)
        salt = await self._catalog.read(lambda catalog: catalog.digest_salt(tenant))
        checked = await self._io(self._check, directory, salt)
        digest = checked.manifest.digest
        async with self._publishing:
            await self._io(self._store.publish, directory / TENSORS_FILE, digest)
            try:
                return await self._catalog.change(lambda catalog: catalog.publish_adapter(tenant, name, checked))
            except LoraplexError:
                # Superseded or out of reach of the database: the next start collects the file instead.
                with contextlib.suppress(Unavailable, StorageFull):
                    await self._catalog.read(lambda catalog: catalog.drop_unpublished(digest, self._store.remove))
                raise

    def _check(self, directory: Path, salt: str) -> CheckedAdapter:
        with translated_disk_errors("the upload"):
            return check_adapter(directory, bases=self._bases, digest_salt=salt, config=self._config)

    async def _drop(self, upload_id: str) -> None:
        self._uploads.pop(upload_id, None)
        await self._io(self._staging.remove, upload_id)

    def _upload(self, upload_id: str) -> _Upload:
        upload = self._uploads.get(upload_id)
        if upload is None:
            raise NotFound(
                "no such upload: it was finished, aborted, or idle for too long",
                param="upload_id",
                code="upload_not_found",
            )
        return upload

    async def _to_the_end(self, work: Coroutine[Any, Any, R]) -> R:
        """Goes on when the caller is cancelled: a client that hangs up must not stop a change half-way."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    def _io(self, call: Callable[..., R], *args: Any) -> Awaitable[R]:
        return asyncio.get_running_loop().run_in_executor(self._io_threads, call, *args)
