"""A ControlPlane in memory: tenants, keys, adapters and snapshots without database, files or intake checks.

Used by the gateway's tests and its capacity measurement. ``away`` makes every call fail, as a dead controller would.
"""

import asyncio
import hashlib
import time
from dataclasses import dataclass, field, replace

from loraplex.core.adapter import AdapterManifest, AdapterRef
from loraplex.core.control import (
    AdapterView,
    ArtifactInfo,
    BaseModelView,
    ControlSnapshot,
    NewKey,
    QuotaShare,
    ReplicaRoute,
    TenantDemand,
)
from loraplex.core.errors import BadAdapter, Conflict, NotFound, PermissionDenied, Unavailable
from loraplex.core.ids import Digest, GatewayId, TenantName
from loraplex.core.tenant import KeyView, Role, TenantLimits, TenantView, UsageRow


@dataclass(slots=True, kw_only=True)
class _Upload:
    tenant: TenantName
    name: str
    files: dict[str, bytearray] = field(default_factory=dict)


class FakeControl:
    """Implements ``core.control.ControlPlane``; every tenant's whole quota is leased to whoever asks."""

    def __init__(self, *, base_models: tuple[BaseModelView, ...], routes: tuple[ReplicaRoute, ...] = ()) -> None:
        self.state = ControlSnapshot(
            epoch=1,
            version=1,
            tenants=(),
            keys=(),
            adapters=(),
            base_models=base_models,
            routes=routes,
            cluster_secret="fake-secret",
        )
        self.away = False
        self.appended: list[tuple[str, int]] = []
        """(file name, bytes) of each append."""
        self.usage_rows: list[UsageRow] = []
        self.demand: list[TenantDemand] = []
        self.trace_batches: list[bytes] = []
        self.uploads: dict[str, _Upload] = {}
        self._artifacts: dict[Digest, bytes] = {}
        self._changed = asyncio.Event()
        self._number = 0

    def add_tenant(self, name: str, *, limits: TenantLimits | None = None) -> TenantView:
        tenant = TenantView(name=TenantName(name), cache_salt=f"salt-of-{name}", limits=limits or TenantLimits())
        self._put(tenants=(*self.state.tenants, tenant))
        return tenant

    def add_key(self, tenant: str, key: str, *, role: Role = Role.MEMBER) -> KeyView:
        self._number += 1
        view = KeyView(
            key_id=f"key-{self._number}",
            tenant=TenantName(tenant),
            role=role,
            key_sha256=hashlib.sha256(key.encode()).hexdigest(),
            created_s=time.time(),
        )
        self._put(keys=(*self.state.keys, view))
        return view

    def add_adapter(self, tenant: str, name: str, content: bytes = b"weights") -> AdapterView:
        """A new version, current at once."""
        owner = TenantName(tenant)
        versions = [a for a in self.state.adapters if (a.ref.tenant, a.ref.name) == (owner, name)]
        digest = Digest(hashlib.sha256(tenant.encode() + b"/" + content).hexdigest())
        version = max((a.ref.version for a in versions), default=0) + 1
        adapter = AdapterView(
            ref=AdapterRef(tenant=owner, name=name, version=version, digest=digest),
            base_model_id=self.state.base_models[0].base_model_id,
            max_lora_rank=8,
            num_bytes=len(content),
            created_s=time.time(),
            current=True,
        )
        self._artifacts[digest] = content
        others = tuple(replace(a, current=False) if a in versions else a for a in self.state.adapters)
        self._put(adapters=(*others, adapter))
        return adapter

    def set_epoch(self, epoch: int, *, version: int = 1) -> None:
        self.state = replace(self.state, epoch=epoch, version=version)
        self._notify()

    def set_routes(self, routes: tuple[ReplicaRoute, ...]) -> None:
        self._put(routes=routes)

    async def snapshot(self, *, after_epoch: int, after_version: int, timeout_s: float) -> ControlSnapshot | None:
        self._check()
        if (self.state.epoch, self.state.version) == (after_epoch, after_version):
            try:
                async with asyncio.timeout(timeout_s):
                    await self._changed.wait()
            except TimeoutError:
                return None
            self._check()
        return self.state

    async def lease_quota(self, gateway_id: GatewayId, demand: tuple[TenantDemand, ...]) -> tuple[QuotaShare, ...]:
        self._check()
        self.demand.extend(demand)
        return tuple(QuotaShare(tenant=tenant.name, share=1.0) for tenant in self.state.tenants)

    async def report_usage(self, gateway_id: GatewayId, rows: tuple[UsageRow, ...]) -> None:
        self._check()
        self.usage_rows.extend(rows)

    async def record_traces(self, gateway_id: GatewayId, batch: bytes) -> None:
        self._check()
        self.trace_batches.append(batch)

    async def artifact(self, digest: Digest) -> ArtifactInfo:
        self._check()
        if digest not in self._artifacts:
            raise NotFound(f"no artifact {digest}")
        base = self.state.base_models[0].base_model_id
        size = len(self._artifacts[digest])
        manifest = AdapterManifest(digest=digest, base_model_id=base, blocks=(), num_bytes=size)
        return ArtifactInfo(manifest=manifest, url=f"memory://{digest}")

    async def read_artifact(self, digest: Digest, *, offset: int, max_bytes: int) -> bytes:
        self._check()
        return self._artifacts[digest][offset : offset + max_bytes]

    async def begin_upload(self, tenant: TenantName, name: str) -> str:
        self._check()
        self._number += 1
        upload_id = f"upload-{self._number}"
        self.uploads[upload_id] = _Upload(tenant=tenant, name=name)
        return upload_id

    async def append_upload(self, upload_id: str, filename: str, data: bytes) -> None:
        self._check()
        self.appended.append((filename, len(data)))
        self.uploads[upload_id].files.setdefault(filename, bytearray()).extend(data)

    async def commit_upload(self, upload_id: str) -> AdapterView:
        self._check()
        upload = self.uploads.pop(upload_id)
        content = bytes(upload.files["adapter_model.safetensors"])
        if content.startswith(b"bad"):
            raise BadAdapter("adapter_model.safetensors: the header is not JSON", param="adapter_model.safetensors")
        return self.add_adapter(upload.tenant, upload.name, content)

    async def abort_upload(self, upload_id: str) -> None:
        self._check()
        self.uploads.pop(upload_id, None)

    async def register_url(self, tenant: TenantName, name: str, url: str) -> AdapterView:
        self._check()
        if not url.startswith("memory://approved/"):
            raise PermissionDenied(f"The URL '{url}' is below none of the approved prefixes.", param="url")
        return self.add_adapter(tenant, name, url.encode())

    async def set_current(self, tenant: TenantName, name: str, version: int) -> AdapterView:
        self._check()
        own = [a for a in self.state.adapters if (a.ref.tenant, a.ref.name) == (tenant, name)]
        if version not in [a.ref.version for a in own]:
            raise NotFound(f"The adapter '{name}' has no version {version}.", param="version")
        changed = tuple(replace(a, current=a.ref.version == version) if a in own else a for a in self.state.adapters)
        self._put(adapters=changed)
        return next(a for a in changed if (a.ref.tenant, a.ref.name, a.ref.version) == (tenant, name, version))

    async def delete_adapter(self, tenant: TenantName, name: str, version: int | None) -> None:
        self._check()
        gone = [
            a
            for a in self.state.adapters
            if (a.ref.tenant, a.ref.name) == (tenant, name) and version in (None, a.ref.version)
        ]
        if not gone:
            raise NotFound(f"The adapter '{name}' does not exist.", param="name")
        self._put(adapters=tuple(a for a in self.state.adapters if a not in gone))

    async def create_tenant(self, name: str, limits: TenantLimits) -> TenantView:
        self._check()
        if any(tenant.name == name for tenant in self.state.tenants):
            raise Conflict(f"The tenant '{name}' exists.", param="name")
        return self.add_tenant(name, limits=limits)

    async def update_tenant(self, name: TenantName, limits: TenantLimits) -> TenantView:
        self._check()
        changed = replace(self._tenant(name), limits=limits)
        self._put(tenants=tuple(changed if t.name == name else t for t in self.state.tenants))
        return changed

    async def delete_tenant(self, name: TenantName) -> None:
        self._check()
        self._tenant(name)
        self._put(
            tenants=tuple(t for t in self.state.tenants if t.name != name),
            keys=tuple(k for k in self.state.keys if k.tenant != name),
            adapters=tuple(a for a in self.state.adapters if a.ref.tenant != name),
        )

    async def create_key(self, tenant: TenantName, role: Role) -> NewKey:
        self._check()
        self._tenant(tenant)
        key = f"lpx_fake_{self._number:08d}"
        return NewKey(key=key, view=self.add_key(tenant, key, role=role))

    async def delete_key(self, tenant: TenantName, key_id: str) -> None:
        self._check()
        if not any(k.key_id == key_id and k.tenant == tenant for k in self.state.keys):
            raise NotFound(f"The key '{key_id}' does not exist.", param="key_id")
        self._put(keys=tuple(k for k in self.state.keys if k.key_id != key_id))

    async def usage(self, tenant: TenantName) -> UsageRow:
        self._check()
        own = [row for row in self.usage_rows if row.tenant == tenant]
        return UsageRow(
            tenant=tenant,
            requests=sum(row.requests for row in own),
            prompt_tokens=sum(row.prompt_tokens for row in own),
            output_tokens=sum(row.output_tokens for row in own),
        )

    def _tenant(self, name: TenantName) -> TenantView:
        for tenant in self.state.tenants:
            if tenant.name == name:
                return tenant
        raise NotFound(f"The tenant '{name}' does not exist.", param="tenant")

    def _check(self) -> None:
        if self.away:
            raise Unavailable("the controller is away; try again shortly")

    def _put(self, **changes: object) -> None:
        self.state = replace(self.state, version=self.state.version + 1, **changes)  # type: ignore[arg-type]
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
