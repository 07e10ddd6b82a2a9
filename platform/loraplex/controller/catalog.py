"""The control database as the controller uses it: each method is one transaction over tenants, keys and adapters.

Owns the open Database and a mirror of what snapshots show, kept per tenant: a change reads back the one tenant that it
touched, so its cost does not grow with the number of tenants. Lives in one thread (``catalog_thread``) from its
construction on; what it returns is immutable.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import TypeVar

from sqlalchemy.orm import Session

from loraplex.controller.config import ControllerOptions
from loraplex.core.clock import Clock
from loraplex.core.control import AdapterView, NewKey
from loraplex.core.errors import NotFound
from loraplex.core.ids import Digest, TenantName
from loraplex.core.tenant import KeyView, Role, TenantLimits, TenantView, UsageRow
from loraplex.database.database import Database
from loraplex.registry.intake import CheckedAdapter
from loraplex.registry.registry import Registry, StoredArtifact
from loraplex.tenancy.accounts import Accounts
from loraplex.tenancy.keys import new_key

R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogView:
    """All that a snapshot takes from the database, sorted by tenant."""

    tenants: tuple[TenantView, ...]
    keys: tuple[KeyView, ...]
    adapters: tuple[AdapterView, ...]
    limits: Mapping[TenantName, TenantLimits]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """One tenant's part of the view."""

    tenant: TenantView
    keys: tuple[KeyView, ...]
    adapters: tuple[AdapterView, ...]


class Catalog:
    """Every method raises what accounts and registry raise, and StorageFull or Unavailable when the database does."""

    def __init__(self, options: ControllerOptions, clock: Clock) -> None:
        """Opens the database and takes the lease. Raises BadConfig, StorageFull, Unavailable."""
        self._clock = clock
        self._accounts = Accounts(clock)
        self._registry = Registry(clock)
        self._database = Database(options.controller.database, directory=options.data_dir)
        self.epoch = self._database.epoch
        self.cluster_secret = self._database.cluster_secret
        with self._database.read() as session:
            self._parts = self._load_all(session)

    @property
    def in_doubt(self) -> bool:
        """As the database's; any thread."""
        return self._database.in_doubt

    def give_up(self) -> None:
        """As the database's; any thread."""
        self._database.give_up()

    def close(self) -> None:
        self._database.close()

    def view(self) -> CatalogView:
        parts = [self._parts[name] for name in sorted(self._parts)]
        return CatalogView(
            tenants=tuple(part.tenant for part in parts),
            keys=tuple(chain.from_iterable(part.keys for part in parts)),
            adapters=tuple(chain.from_iterable(part.adapters for part in parts)),
            limits={part.tenant.name: part.tenant.limits for part in parts},
        )

    def create_tenant(self, name: str, limits: TenantLimits) -> TenantView:
        with self._changing(TenantName(name)) as session:
            self._accounts.create_tenant(session, name, limits)
        return self._tenant(TenantName(name))

    def ensure_tenant(self, name: str, limits: TenantLimits) -> TenantView:
        """Leaves a tenant that exists as it is, limits included."""
        if name in self._parts:
            return self._tenant(TenantName(name))
        return self.create_tenant(name, limits)

    def update_tenant(self, name: TenantName, limits: TenantLimits) -> TenantView:
        with self._changing(name) as session:
            self._accounts.update_tenant(session, name, limits)
        return self._tenant(name)

    def delete_tenant(self, name: TenantName) -> None:
        """Its keys, usage and adapters go in the same transaction."""
        with self._changing(name) as session:
            self._registry.delete_tenant(session, name)
            self._accounts.delete_tenant(session, name)

    def create_key(self, tenant: TenantName, role: Role) -> NewKey:
        key = new_key()
        with self._changing(tenant) as session:
            view = self._accounts.add_key(session, tenant, role, key)
        return NewKey(key=key, view=view)

    def ensure_key(self, tenant: TenantName, role: Role, key: str) -> KeyView:
        with self._changing(tenant) as session:
            return self._accounts.ensure_key(session, tenant, role, key)

    def delete_key(self, tenant: TenantName, key_id: str) -> None:
        with self._changing(tenant) as session:
            self._accounts.delete_key(session, tenant, key_id)

    def add_usage(self, rows: tuple[UsageRow, ...]) -> None:
        with self._database.write() as session:
            self._accounts.add_usage(session, rows)

    def usage(self, tenant: TenantName) -> UsageRow:
        with self._database.read() as session:
            return self._accounts.usage(session, tenant)

    def digest_salt(self, tenant: TenantName) -> str:
        with self._database.read() as session:
            return self._accounts.digest_salt(session, tenant)

    def current_adapter(self, tenant: TenantName, name: str) -> AdapterView | None:
        with self._database.read() as session:
            return self._registry.current(session, tenant, name)

    def check_room(self, tenant: TenantName, name: str, *, extra_bytes: int) -> None:
        """Before the work is done; ``publish_adapter`` checks again."""
        limits = self._tenant(tenant).limits
        with self._database.read() as session:
            self._registry.check_room(session, tenant, name, limits, extra_bytes=extra_bytes)

    def publish_adapter(self, tenant: TenantName, name: str, checked: CheckedAdapter) -> AdapterView:
        limits = self._tenant(tenant).limits
        with self._changing(tenant) as session:
            return self._registry.publish(session, tenant, name, checked, limits)

    def set_current(self, tenant: TenantName, name: str, version: int) -> AdapterView:
        with self._changing(tenant) as session:
            return self._registry.set_current(session, tenant, name, version)

    def delete_adapter(self, tenant: TenantName, name: str, version: int | None) -> None:
        with self._changing(tenant) as session:
            self._registry.delete(session, tenant, name, version)

    def artifact(self, digest: Digest) -> StoredArtifact:
        with self._database.read() as session:
            return self._registry.artifact(session, digest)

    def artifact_digests(self) -> frozenset[Digest]:
        with self._database.read() as session:
            return self._registry.digests(session)

    def forget_artifacts(self, grace_s: float, remove_file: Callable[[Digest], None]) -> None:
        """Removes those that nothing has named for ``grace_s``. The lease is held while files go: a newer controller
        cannot be publishing the same ones. A row that is left without its file by a crash is named by nothing."""
        with self._database.write() as session:
            for digest in self._registry.forget(session, released_before_s=self._clock.wall_s() - grace_s):
                remove_file(digest)

    def drop_unpublished(self, digest: Digest, remove_file: Callable[[Digest], None]) -> None:
        """Removes the file of a publication that failed, unless the digest is stored for another reason."""
        with self._database.write() as session:
            if digest not in self._registry.digests(session):
                remove_file(digest)

    def read_session(self, call: Callable[[Session], R]) -> R:
        """For the tables of plans and replicas, which no snapshot shows."""
        with self._database.read() as session:
            return call(session)

    def write_session(self, call: Callable[[Session], R]) -> R:
        """As above, in one transaction of the controller that holds the lease."""
        with self._database.write() as session:
            return call(session)

    @contextmanager
    def _changing(self, tenant: TenantName) -> Iterator[Session]:
        """A write transaction; after its commit the mirror shows what it did to ``tenant``."""
        with self._database.write() as session:
            yield session
            part = self._load(session, tenant)
        if part is None:
            self._parts.pop(tenant, None)
        else:
            self._parts[tenant] = part

    def _tenant(self, name: TenantName) -> TenantView:
        part = self._parts.get(name)
        if part is None:
            raise NotFound(f"no tenant {name!r}", param="tenant")
        return part.tenant

    def _load(self, session: Session, name: TenantName) -> _Part | None:
        try:
            tenant = self._accounts.tenant(session, name)
        except NotFound:
            return None
        return _part(tenant, self._accounts.keys(session, name), self._registry.views(session, name))

    def _load_all(self, session: Session) -> dict[TenantName, _Part]:
        keys: dict[TenantName, list[KeyView]] = {}
        for key in self._accounts.keys(session):
            keys.setdefault(key.tenant, []).append(key)
        adapters: dict[TenantName, list[AdapterView]] = {}
        for adapter in self._registry.views(session):
            adapters.setdefault(adapter.ref.tenant, []).append(adapter)
        return {
            tenant.name: _part(tenant, tuple(keys.get(tenant.name, ())), tuple(adapters.get(tenant.name, ())))
            for tenant in self._accounts.tenants(session)
        }


def _part(tenant: TenantView, keys: tuple[KeyView, ...], adapters: tuple[AdapterView, ...]) -> _Part:
    counted = replace(
        tenant,
        num_adapters=len({adapter.ref.name for adapter in adapters}),
        adapter_bytes=sum(adapter.num_bytes for adapter in adapters),
    )
    return _Part(tenant=counted, keys=keys, adapters=adapters)
