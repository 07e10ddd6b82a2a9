"""Adapters, versions and aliases of all tenants in the control database: the one writer of those tables.

Every method works inside a session that the caller opened and will commit, so a change is there as a whole or not at
all. Knows no files: the caller has stored the artifact before ``publish`` and removes it after ``forget``. Called by
the controller.
"""

import zlib
from collections.abc import Collection
from dataclasses import dataclass

import msgspec
from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from loraplex.core.adapter import AdapterManifest, AdapterRef
from loraplex.core.clock import Clock
from loraplex.core.control import AdapterView
from loraplex.core.errors import Conflict, NotFound, RateLimited
from loraplex.core.ids import BaseModelId, Digest, TenantName
from loraplex.core.tenant import TenantLimits
from loraplex.registry.intake import CheckedAdapter
from loraplex.registry.tables import AdapterRow, ArtifactRow, VersionRow

_QUOTA_RETRY_S = 60.0
"""Adapter limits do not refill with time; a client that retries at all should do it seldom."""


_FORGOTTEN_AT_ONCE = 50
"""Their files may lie in an object store, and nobody else writes while they are removed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredArtifact:
    manifest: AdapterManifest
    content_sha256: str


class Registry:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def check_room(
        self, session: Session, tenant: TenantName, name: str, limits: TenantLimits, *, extra_bytes: int
    ) -> None:
        """Raises RateLimited when a version of ``extra_bytes`` under ``name`` would exceed the tenant's limits."""
        if limits.max_adapters is not None:
            names = session.scalar(
                select(func.count())
                .select_from(AdapterRow)
                .where(AdapterRow.tenant == tenant, AdapterRow.current_version.is_not(None), AdapterRow.name != name)
            )
            if (names or 0) >= limits.max_adapters:
                raise RateLimited(
                    f"the tenant's limit of {limits.max_adapters} adapters is reached",
                    retry_after_s=_QUOTA_RETRY_S,
                    code="adapter_limit_exceeded",
                )
        if limits.max_adapter_bytes is not None:
            stored = session.scalar(
                select(func.sum(ArtifactRow.num_bytes))
                .join(VersionRow, VersionRow.digest == ArtifactRow.digest)
                .where(VersionRow.tenant == tenant)
            )
            if (stored or 0) + extra_bytes > limits.max_adapter_bytes:
                raise RateLimited(
                    f"the tenant's adapters hold {stored or 0} bytes; {extra_bytes} more exceed its limit of "
                    f"{limits.max_adapter_bytes} bytes",
                    retry_after_s=_QUOTA_RETRY_S,
                    code="adapter_bytes_exceeded",
                )

    def publish(
        self, session: Session, tenant: TenantName, name: str, checked: CheckedAdapter, limits: TenantLimits
    ) -> AdapterView:
        """The adapter becomes a version of ``name`` and the current one. Content that the name has already is not
        stored again: its version becomes current. Raises RateLimited.
        """
        manifest = checked.manifest
        adapter = session.get(AdapterRow, (tenant, name))
        if adapter is None:
            adapter = AdapterRow(tenant=tenant, name=name, current_version=None, last_version=0)
            session.add(adapter)
        version = session.scalar(
            select(VersionRow.version).where(
                VersionRow.tenant == tenant, VersionRow.name == name, VersionRow.digest == manifest.digest
            )
        )
        if version is None:
            self.check_room(session, tenant, name, limits, extra_bytes=manifest.num_bytes)
            self._keep_artifact(session, checked)
            adapter.last_version += 1
            version = adapter.last_version
            session.flush()
            session.add(
                VersionRow(
                    tenant=tenant,
                    name=name,
                    version=version,
                    digest=manifest.digest,
                    created_s=self._clock.wall_s(),
                )
            )
        adapter.current_version = version
        session.flush()
        return self._view(session, tenant, name, version)

    def set_current(self, session: Session, tenant: TenantName, name: str, version: int) -> AdapterView:
        """Moves the alias. Raises NotFound."""
        self._version(session, tenant, name, version)
        session.get_one(AdapterRow, (tenant, name)).current_version = version
        session.flush()
        return self._view(session, tenant, name, version)

    def delete(self, session: Session, tenant: TenantName, name: str, version: int | None) -> None:
        """One version or all. Raises NotFound; Conflict for the current version while others remain, since it is not
        for us to choose which of them the name shall mean.
        """
        adapter = session.get(AdapterRow, (tenant, name))
        if adapter is None or adapter.current_version is None:
            raise _no_adapter(name)
        rows = list(session.scalars(select(VersionRow).where(VersionRow.tenant == tenant, VersionRow.name == name)))
        if version is not None:
            self._version(session, tenant, name, version)
            if version == adapter.current_version and len(rows) > 1:
                raise Conflict(
                    f"version {version} of adapter {name!r} is the current one; roll back to another version first, "
                    "or delete the whole adapter",
                    param="version",
                )
            rows = [row for row in rows if row.version == version]
        digests = {row.digest for row in rows}
        if any(row.version == adapter.current_version for row in rows):
            adapter.current_version = None
        for row in rows:
            session.delete(row)
        session.flush()
        self._release(session, digests)

    def delete_tenant(self, session: Session, tenant: TenantName) -> None:
        """All versions of a tenant that is about to be deleted. Its names go with the tenant's row."""
        mine = VersionRow.tenant == tenant
        digests = set(session.scalars(select(VersionRow.digest).where(mine)))
        session.execute(delete(VersionRow).where(mine))
        self._release(session, digests)

    def current(self, session: Session, tenant: TenantName, name: str) -> AdapterView | None:
        """None when no version of the name exists."""
        adapter = session.get(AdapterRow, (tenant, name))
        if adapter is None or adapter.current_version is None:
            return None
        return self._view(session, tenant, name, adapter.current_version)

    def views(self, session: Session, tenant: TenantName | None = None) -> tuple[AdapterView, ...]:
        """One tenant's versions or all, by (tenant, name, version). One query, no manifest is read."""
        query = (
            select(
                VersionRow.tenant,
                VersionRow.name,
                VersionRow.version,
                VersionRow.digest,
                VersionRow.created_s,
                AdapterRow.current_version,
                ArtifactRow.base_model_id,
                ArtifactRow.max_lora_rank,
                ArtifactRow.num_bytes,
            )
            .join(AdapterRow, (AdapterRow.tenant == VersionRow.tenant) & (AdapterRow.name == VersionRow.name))
            .join(ArtifactRow, ArtifactRow.digest == VersionRow.digest)
            .order_by(VersionRow.tenant, VersionRow.name, VersionRow.version)
        )
        if tenant is not None:
            query = query.where(VersionRow.tenant == tenant)
        return tuple(
            AdapterView(
                ref=AdapterRef(
                    tenant=TenantName(row.tenant), name=row.name, version=row.version, digest=Digest(row.digest)
                ),
                base_model_id=BaseModelId(row.base_model_id),
                max_lora_rank=row.max_lora_rank,
                num_bytes=row.num_bytes,
                created_s=row.created_s,
                current=row.version == row.current_version,
            )
            for row in session.execute(query)
        )

    def artifact(self, session: Session, digest: Digest) -> StoredArtifact:
        """Also of a deleted adapter, until its grace is over. Raises NotFound."""
        row = session.get(ArtifactRow, digest)
        if row is None:
            raise NotFound(f"no artifact {digest}")
        manifest = msgspec.msgpack.decode(zlib.decompress(row.manifest), type=AdapterManifest)
        return StoredArtifact(manifest=manifest, content_sha256=row.content_sha256)

    def digests(self, session: Session) -> frozenset[Digest]:
        """Of all artifacts whose files must be kept."""
        return frozenset(Digest(digest) for digest in session.scalars(select(ArtifactRow.digest)))

    def forget(self, session: Session, *, released_before_s: float) -> tuple[Digest, ...]:
        """Drops the artifacts that nothing has named since ``released_before_s``, the longest first and not too many at
        once; the caller removes their files."""
        query = select(ArtifactRow).where(ArtifactRow.released_s < released_before_s)
        rows = list(session.scalars(query.order_by(ArtifactRow.released_s).limit(_FORGOTTEN_AT_ONCE)))
        for row in rows:
            session.delete(row)
        session.flush()
        return tuple(Digest(row.digest) for row in rows)

    def _keep_artifact(self, session: Session, checked: CheckedAdapter) -> None:
        manifest = checked.manifest
        row = session.get(ArtifactRow, manifest.digest)
        if row is not None:
            row.released_s = None
            return
        session.add(
            ArtifactRow(
                digest=manifest.digest,
                content_sha256=checked.content_sha256,
                base_model_id=manifest.base_model_id,
                max_lora_rank=manifest.max_lora_rank,
                num_bytes=manifest.num_bytes,
                manifest=zlib.compress(msgspec.msgpack.encode(manifest)),
                released_s=None,
            )
        )

    def _release(self, session: Session, digests: Collection[str]) -> None:
        for digest in digests:
            if session.scalar(select(VersionRow.version).where(VersionRow.digest == digest).limit(1)) is None:
                session.get_one(ArtifactRow, digest).released_s = self._clock.wall_s()
        session.flush()

    def _version(self, session: Session, tenant: TenantName, name: str, version: int) -> VersionRow:
        row = session.get(VersionRow, (tenant, name, version))
        if row is None:
            known = session.get(AdapterRow, (tenant, name))
            if known is None or known.current_version is None:
                raise _no_adapter(name)
            raise NotFound(f"adapter {name!r} has no version {version}", param="version")
        return row

    def _view(self, session: Session, tenant: TenantName, name: str, version: int) -> AdapterView:
        row = self._version(session, tenant, name, version)
        artifact = session.get_one(ArtifactRow, row.digest)
        return AdapterView(
            ref=AdapterRef(tenant=tenant, name=name, version=version, digest=Digest(row.digest)),
            base_model_id=BaseModelId(artifact.base_model_id),
            max_lora_rank=artifact.max_lora_rank,
            num_bytes=artifact.num_bytes,
            created_s=row.created_s,
            current=session.get_one(AdapterRow, (tenant, name)).current_version == version,
        )


def _no_adapter(name: str) -> NotFound:
    return NotFound(f"no adapter {name!r}", param="name")
