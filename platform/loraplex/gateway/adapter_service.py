"""Adapter calls of a tenant, for HTTP and gRPC alike: an upload becomes a version, names move, versions go.

Changes go to the controller; lists come from the snapshot. A change is answered only once this gateway sees it too
(within a bound), so that a client finds what it has just made.
"""

import logging
from collections.abc import AsyncIterator

from loraplex.core.control import AdapterView, ControlPlane
from loraplex.core.errors import InvalidInput, LoraplexError, NotFound, PayloadTooLarge, Unavailable
from loraplex.core.tenant import TenantView
from loraplex.gateway.checks import check_text
from loraplex.gateway.cluster_view import ClusterView
from loraplex.gateway.config import GatewayConfig
from loraplex.gateway.directory import Directory, Principal

logger = logging.getLogger(__name__)

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


class AdapterService:
    def __init__(self, config: GatewayConfig, *, view: ClusterView, control: ControlPlane) -> None:
        self.config = config
        self._view = view
        self._control = control

    def list_current(self, principal: Principal) -> tuple[AdapterView, ...]:
        """The current version of each adapter, by name."""
        tenant = principal.require_tenant()
        return tuple(adapter for adapter in self._view.directory.adapters(tenant) if adapter.current)

    def versions(self, principal: Principal, name: str) -> tuple[AdapterView, ...]:
        """All versions of one adapter. Raises NotFound."""
        return self._view.directory.adapter_versions(principal.require_tenant(), name)

    async def upload(self, principal: Principal, name: str, pieces: AsyncIterator[tuple[str, bytes]]) -> AdapterView:
        """``pieces``: (one of ADAPTER_FILES, bytes) in any sizes. Nothing is registered unless all arrive and
        are sound.

        Raises InvalidInput, BadAdapter, PayloadTooLarge, RateLimited, StorageFull, PermissionDenied or Unavailable.
        """
        tenant = principal.require_adapter_management()
        upload_id = await self._control.begin_upload(tenant.name, check_text(name, param="name"))
        try:
            await self._append(upload_id, pieces)
            adapter = await self._control.commit_upload(upload_id)
        except BaseException as error:
            await self._discard(upload_id)
            if isinstance(error, NotFound) and error.code == "upload_not_found":
                # The caller knows of no upload id: it is the controller that lost it, by a restart or as idle.
                raise Unavailable("The upload was dropped half-way; send it again.", code="upload_dropped") from error
            raise
        return await self._visible(tenant, adapter)

    async def register_url(self, principal: Principal, name: str, url: str) -> AdapterView:
        """Raises as ``upload`` does, and PermissionDenied for a URL that the administrator did not approve."""
        tenant = principal.require_adapter_management()
        check_text(url, param="url")
        adapter = await self._control.register_url(tenant.name, check_text(name, param="name"), url)
        return await self._visible(tenant, adapter)

    async def roll_back(self, principal: Principal, name: str, version: int) -> AdapterView:
        """Makes ``version`` the one that the bare name means. Raises NotFound."""
        tenant = principal.require_adapter_management()
        adapter = await self._control.set_current(tenant.name, check_text(name, param="name"), version)
        return await self._visible(tenant, adapter)

    async def delete(self, principal: Principal, name: str, version: int | None) -> None:
        """One version, or all when ``version`` is None. Raises NotFound."""
        tenant = principal.require_adapter_management()
        await self._control.delete_adapter(tenant.name, check_text(name, param="name"), version)

        def gone(directory: Directory) -> bool:
            if version is not None:
                return directory.adapter_version(tenant, name, version) is None
            try:
                directory.adapter_versions(tenant, name)
            except NotFound:
                return True
            return False

        await self._view.wait_for(gone, timeout_s=self.config.visibility_wait_s)

    async def _discard(self, upload_id: str) -> None:
        try:
            await self._control.abort_upload(upload_id)
        except LoraplexError as error:
            # The controller clears abandoned uploads by itself; the caller hears why the upload failed, not this.
            logger.warning("upload %s could not be discarded: %s", upload_id, error.message)

    async def _append(self, upload_id: str, pieces: AsyncIterator[tuple[str, bytes]]) -> None:
        """Regroups the pieces into chunks of the configured size, file by file."""
        seen: list[str] = []
        pending = bytearray()
        total = 0
        async for filename, data in pieces:
            if not seen or seen[-1] != filename:
                if filename not in ADAPTER_FILES or filename in seen:
                    raise InvalidInput(
                        f"An upload has the files {' and '.join(ADAPTER_FILES)}, once each; got '{filename}'.",
                        param="file",
                    )
                if pending:
                    await self._control.append_upload(upload_id, seen[-1], bytes(pending))
                    pending.clear()
                seen.append(filename)
            total += len(data)
            if total > self.config.max_upload_bytes:
                raise PayloadTooLarge(f"An upload may have {self.config.max_upload_bytes} bytes.")
            pending += data
            while len(pending) >= self.config.upload_chunk_bytes:
                await self._control.append_upload(upload_id, filename, bytes(pending[: self.config.upload_chunk_bytes]))
                del pending[: self.config.upload_chunk_bytes]
        if pending:
            await self._control.append_upload(upload_id, seen[-1], bytes(pending))
        missing = [name for name in ADAPTER_FILES if name not in seen]
        if missing:
            raise InvalidInput(f"The upload lacks {' and '.join(missing)}.", param=missing[0])

    async def _visible(self, tenant: TenantView, adapter: AdapterView) -> AdapterView:
        ref = adapter.ref

        def seen(directory: Directory) -> bool:
            found = directory.adapter_version(tenant, ref.name, ref.version)
            return found is not None and found.ref.digest == ref.digest and found.current

        if not await self._view.wait_for(seen, timeout_s=self.config.visibility_wait_s):
            logger.warning("adapter %s of %s is registered but not yet in the snapshot", ref.name, ref.tenant)
        return adapter
