"""Tenants, their keys, limits and usage in the control database: the one writer of those tables.

Every method works inside a session that the caller opened and will commit. Knows nothing of adapters: the controller
fills in ``num_adapters`` and ``adapter_bytes``. Called by the controller.
"""

import re
import secrets
from dataclasses import fields
from typing import cast

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from loraplex.core.clock import Clock
from loraplex.core.errors import Conflict, InvalidInput, NotFound
from loraplex.core.ids import TenantName
from loraplex.core.tenant import MAX_WEIGHT, KeyView, Role, TenantLimits, TenantView, UsageRow
from loraplex.tenancy.keys import check_given_key, hash_key, new_key_id
from loraplex.tenancy.tables import KeyRow, TenantRow, UsageCounterRow

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}\Z")
_LIMIT_FIELDS = tuple(field.name for field in fields(TenantLimits))
_MAX_LIMIT = 2**53
"""Larger numbers lose digits in JSON."""


class Accounts:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def create_tenant(self, session: Session, name: str, limits: TenantLimits) -> TenantView:
        """Raises InvalidInput (name, limits), Conflict when the name is taken."""
        if not _NAME.match(name):
            raise InvalidInput(
                "a tenant name is 1 to 63 of a-z, 0-9, '.', '_', '-' and starts with a letter or digit", param="name"
            )
        _check_limits(limits)
        if session.get(TenantRow, name) is not None:
            raise Conflict(f"tenant {name!r} exists", param="name")
        row = TenantRow(
            name=name,
            cache_salt=secrets.token_hex(32),
            digest_salt=secrets.token_hex(32),
            created_s=self._clock.wall_s(),
        )
        _set_limits(row, limits)
        session.add(row)
        session.flush()
        session.add(UsageCounterRow(tenant=name, requests=0, prompt_tokens=0, output_tokens=0))
        session.flush()
        return _tenant_view(row)

    def update_tenant(self, session: Session, name: TenantName, limits: TenantLimits) -> TenantView:
        """Replaces all limits. Raises InvalidInput, NotFound."""
        _check_limits(limits)
        row = self._tenant(session, name)
        _set_limits(row, limits)
        session.flush()
        return _tenant_view(row)

    def delete_tenant(self, session: Session, name: TenantName) -> None:
        """Keys, usage and the rows of other parts that refer to the tenant go with it. Raises NotFound."""
        session.delete(self._tenant(session, name))
        session.flush()

    def tenant(self, session: Session, name: TenantName) -> TenantView:
        """Raises NotFound."""
        return _tenant_view(self._tenant(session, name))

    def digest_salt(self, session: Session, name: TenantName) -> str:
        """Hex key of the tenant's adapter digests. Raises NotFound."""
        return self._tenant(session, name).digest_salt

    def add_key(self, session: Session, tenant: TenantName, role: Role, key: str) -> KeyView:
        """Stores the hash of ``key``. Raises NotFound, Conflict when any tenant holds that key."""
        self._tenant(session, tenant)
        key_sha256 = hash_key(key)
        if session.scalar(select(KeyRow).where(KeyRow.key_sha256 == key_sha256)) is not None:
            raise Conflict("this key exists", param="key")
        row = KeyRow(
            key_id=new_key_id(),
            tenant=tenant,
            role=role.value,
            key_sha256=key_sha256,
            created_s=self._clock.wall_s(),
        )
        session.add(row)
        session.flush()
        return _key_view(row)

    def ensure_key(self, session: Session, tenant: TenantName, role: Role, key: str) -> KeyView:
        """``add_key`` unless the tenant holds this key with this role. Raises InvalidInput, NotFound, Conflict."""
        check_given_key(key)
        row = session.scalar(select(KeyRow).where(KeyRow.key_sha256 == hash_key(key)))
        if row is not None and row.tenant == tenant and row.role == role.value:
            return _key_view(row)
        return self.add_key(session, tenant, role, key)

    def delete_key(self, session: Session, tenant: TenantName, key_id: str) -> None:
        """Raises NotFound, also for a key of another tenant."""
        row = session.get(KeyRow, key_id)
        if row is None or row.tenant != tenant:
            raise NotFound(f"tenant {tenant!r} has no key {key_id!r}", param="key_id")
        session.delete(row)
        session.flush()

    def tenants(self, session: Session) -> tuple[TenantView, ...]:
        """All, by name."""
        return tuple(_tenant_view(row) for row in session.scalars(select(TenantRow).order_by(TenantRow.name)))

    def keys(self, session: Session, tenant: TenantName | None = None) -> tuple[KeyView, ...]:
        """One tenant's keys or all, oldest first."""
        query = select(KeyRow).order_by(KeyRow.tenant, KeyRow.created_s, KeyRow.key_id)
        if tenant is not None:
            query = query.where(KeyRow.tenant == tenant)
        return tuple(_key_view(row) for row in session.scalars(query))

    def add_usage(self, session: Session, rows: tuple[UsageRow, ...]) -> None:
        """Rows of tenants that are gone are dropped. Raises InvalidInput on negative counts."""
        for row in rows:
            if min(row.requests, row.prompt_tokens, row.output_tokens) < 0:
                raise InvalidInput("usage counts must not be negative")
            session.execute(
                update(UsageCounterRow)
                .where(UsageCounterRow.tenant == row.tenant)
                .values(
                    requests=UsageCounterRow.requests + row.requests,
                    prompt_tokens=UsageCounterRow.prompt_tokens + row.prompt_tokens,
                    output_tokens=UsageCounterRow.output_tokens + row.output_tokens,
                )
                .execution_options(synchronize_session=False)
            )

    def usage(self, session: Session, tenant: TenantName) -> UsageRow:
        """Totals since the tenant was made. Raises NotFound."""
        row = session.get(UsageCounterRow, tenant)
        if row is None:
            raise _no_tenant(tenant)
        return UsageRow(
            tenant=tenant,
            requests=row.requests,
            prompt_tokens=row.prompt_tokens,
            output_tokens=row.output_tokens,
        )

    def _tenant(self, session: Session, name: TenantName) -> TenantRow:
        row = session.get(TenantRow, name)
        if row is None:
            raise _no_tenant(name)
        return row


def _no_tenant(name: TenantName) -> NotFound:
    return NotFound(f"no tenant {name!r}", param="tenant")


def _check_limits(limits: TenantLimits) -> None:
    for name in _LIMIT_FIELDS:
        value = getattr(limits, name)
        if value is not None and not 0 <= value <= _MAX_LIMIT:
            raise InvalidInput(f"{name} must lie between 0 and {_MAX_LIMIT}, or be absent for no limit", param=name)
    if limits.weight is not None and not 1 <= limits.weight <= MAX_WEIGHT:
        raise InvalidInput(f"weight must lie between 1 and {MAX_WEIGHT}, or be absent for 1", param="weight")


def _set_limits(row: TenantRow, limits: TenantLimits) -> None:
    for name in _LIMIT_FIELDS:
        setattr(row, name, getattr(limits, name))


def _tenant_view(row: TenantRow) -> TenantView:
    limits = TenantLimits(**{name: cast(int | None, getattr(row, name)) for name in _LIMIT_FIELDS})
    return TenantView(name=TenantName(row.name), cache_salt=row.cache_salt, limits=limits)


def _key_view(row: KeyRow) -> KeyView:
    return KeyView(
        key_id=row.key_id,
        tenant=TenantName(row.tenant),
        role=Role(row.role),
        key_sha256=row.key_sha256,
        created_s=row.created_s,
    )
