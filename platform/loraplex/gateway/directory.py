"""An index over one control snapshot: keys, tenants, what a model name means to a tenant. Immutable; no I/O.

``ClusterView`` replaces it whole when a newer snapshot arrives; HTTP and gRPC ask it through the service.
"""

import hashlib
import hmac
from dataclasses import dataclass

from loraplex.core.control import AdapterView, BaseModelView, ControlSnapshot
from loraplex.core.errors import NotFound, PermissionDenied, Unauthenticated
from loraplex.core.ids import TenantName
from loraplex.core.tenant import KeyView, Role, TenantView


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Who calls, after the key was checked and, where the address names a tenant, found to agree with it."""

    key_id: str
    role: Role
    tenant: TenantView | None
    """The tenant acted for. None for an administrator who named none."""

    def require_tenant(self) -> TenantView:
        """Raises PermissionDenied for an administrator who named no tenant."""
        if self.tenant is None:
            raise PermissionDenied("An admin key acts for a tenant only below /t/{tenant}/.")
        return self.tenant

    def require_generation(self) -> TenantView:
        """The tenant that pays. Raises PermissionDenied for an administrator: the role has no access to generation."""
        if self.role is Role.ADMIN:
            raise PermissionDenied("An admin key cannot generate; use a key of the tenant.")
        return self.require_tenant()

    def require_adapter_management(self) -> TenantView:
        """Raises PermissionDenied for a member."""
        if self.role is Role.MEMBER:
            raise PermissionDenied("This key may generate and list, but not change adapters.")
        return self.require_tenant()

    def require_admin(self) -> None:
        """Raises PermissionDenied for everyone but an administrator."""
        if self.role is not Role.ADMIN:
            raise PermissionDenied("This needs a key with the admin role.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedModel:
    model_id: str
    """As clients write it."""
    base: BaseModelView
    adapter: AdapterView | None
    """None: the plain base."""


class Directory:
    """Every lookup is a dictionary access keyed by (tenant, name): another tenant's adapter and one that never
    existed take the same path and give the same words."""

    def __init__(self, snapshot: ControlSnapshot) -> None:
        self.snapshot = snapshot
        self._keys = {key.key_sha256.lower(): key for key in snapshot.keys}
        self._tenants = {tenant.name: tenant for tenant in snapshot.tenants}
        self._bases = {str(base.base_model_id): base for base in snapshot.base_models}
        self._by_version: dict[tuple[TenantName, str, int], AdapterView] = {}
        self._by_name: dict[tuple[TenantName, str], list[AdapterView]] = {}
        self._current: dict[tuple[TenantName, str], AdapterView] = {}
        self._by_tenant: dict[TenantName, list[AdapterView]] = {}
        for adapter in sorted(snapshot.adapters, key=lambda a: (a.ref.tenant, a.ref.name, a.ref.version)):
            ref = adapter.ref
            self._by_version[ref.tenant, ref.name, ref.version] = adapter
            self._by_name.setdefault((ref.tenant, ref.name), []).append(adapter)
            self._by_tenant.setdefault(ref.tenant, []).append(adapter)
            if adapter.current:
                self._current[ref.tenant, ref.name] = adapter

    def authenticate(self, key: str | None, *, path_tenant: str | None = None) -> Principal:
        """Raises Unauthenticated for no or an unknown key, NotFound when ``path_tenant`` does not agree with it."""
        if not key:
            raise Unauthenticated(
                "No API key was given. Send it as 'Authorization: Bearer KEY'.", code="missing_api_key"
            )
        view = self._key(key)
        if view is None:
            raise Unauthenticated("The API key is not valid.")
        tenant = self._tenants.get(view.tenant)
        if view.role is Role.ADMIN:
            tenant = None if path_tenant is None else self._tenants.get(TenantName(path_tenant))
            if path_tenant is not None and tenant is None:
                raise self._no_tenant(path_tenant)
        elif tenant is None:
            raise Unauthenticated("The API key is not valid.")
        elif path_tenant is not None and path_tenant != tenant.name:
            raise self._no_tenant(path_tenant)
        return Principal(key_id=view.key_id, role=view.role, tenant=tenant)

    def resolve(self, principal: Principal, model: str) -> ResolvedModel:
        """An adapter name, ``name@version``, or a base id. Raises NotFound for anything the key may not use.

        A base that came later than a tenant's adapter of its name does not take its place.
        """
        adapter = self._find(principal.tenant, model)
        base = self._bases.get(model if adapter is None else str(adapter.base_model_id))
        if base is None:
            raise NotFound(
                f"The model '{model}' does not exist or is not available to this key.",
                param="model",
                code="model_not_found",
            )
        return ResolvedModel(model_id=model, base=base, adapter=adapter)

    def models(self, principal: Principal) -> tuple[ResolvedModel, ...]:
        """Bases first, then the current version of each adapter of the tenant, by name."""
        found = [
            ResolvedModel(model_id=name, base=base, adapter=None)
            for name, base in sorted(self._bases.items())
            if self._find(principal.tenant, name) is None
        ]
        for adapter in self.adapters(principal.tenant):
            base = self._bases.get(str(adapter.base_model_id))
            if adapter.current and base is not None:
                found.append(ResolvedModel(model_id=adapter.ref.name, base=base, adapter=adapter))
        return tuple(found)

    def adapters(self, tenant: TenantView | None) -> tuple[AdapterView, ...]:
        """All versions of all adapters of one tenant, by (name, version)."""
        return () if tenant is None else tuple(self._by_tenant.get(tenant.name, ()))

    def adapter_versions(self, tenant: TenantView, name: str) -> tuple[AdapterView, ...]:
        """By version; NotFound when the tenant has no adapter of this name."""
        versions = self._by_name.get((tenant.name, name))
        if not versions:
            raise NotFound(f"The adapter '{name}' does not exist.", param="name", code="adapter_not_found")
        return tuple(versions)

    def adapter_version(self, tenant: TenantView, name: str, version: int) -> AdapterView | None:
        return self._by_version.get((tenant.name, name, version))

    def tenant(self, name: str) -> TenantView:
        """Raises NotFound."""
        tenant = self._tenants.get(TenantName(name))
        if tenant is None:
            raise self._no_tenant(name)
        return tenant

    def tenants(self) -> tuple[TenantView, ...]:
        return tuple(sorted(self.snapshot.tenants, key=lambda tenant: tenant.name))

    def keys(self, tenant: TenantView) -> tuple[KeyView, ...]:
        return tuple(key for key in self.snapshot.keys if key.tenant == tenant.name)

    def _key(self, key: str) -> KeyView | None:
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
        view = self._keys.get(digest)
        if view is None or not hmac.compare_digest(view.key_sha256.lower(), digest):
            return None
        return view

    def _find(self, tenant: TenantView | None, model: str) -> AdapterView | None:
        if tenant is None:
            return None
        name, at, version = model.rpartition("@")
        if not at:
            return self._current.get((tenant.name, model))
        if not (version.isascii() and version.isdecimal() and len(version) <= 10):
            return None
        return self._by_version.get((tenant.name, name, int(version)))

    @staticmethod
    def _no_tenant(name: str) -> NotFound:
        return NotFound(
            f"The tenant '{name}' does not exist or is not available to this key.",
            param="tenant",
            code="tenant_not_found",
        )
