"""A tenant as gateways see it. The control database holds the rest."""

from dataclasses import dataclass, fields
from enum import StrEnum

from loraplex.core.ids import TenantName

MAX_WEIGHT = 1_000_000


class Role(StrEnum):
    ADMIN = "admin"
    """Manages tenants and keys; belongs to no tenant's data."""
    TENANT_ADMIN = "tenant_admin"
    """Registers and deletes its tenant's adapters, and generates."""
    MEMBER = "member"
    """Generates and lists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantLimits:
    """None means unlimited."""

    requests_per_minute: int | None = None
    """Those that are admitted."""
    tokens_per_minute: int | None = None
    """Prompt + output tokens."""
    max_concurrent_requests: int | None = None
    """Open at the same time, over all gateways."""
    max_adapters: int | None = None
    """Names that are registered at the same time."""
    max_adapter_bytes: int | None = None
    """Sum over all stored versions."""
    weight: int | None = None
    """Of what the replicas do while tenants compete for them, a tenant of weight 4 gets four times as much as one of
    weight 1. At least 1; None: 1."""


LIMIT_NAMES = tuple(field.name for field in fields(TenantLimits))


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantView:
    name: TenantName
    cache_salt: str
    limits: TenantLimits
    num_adapters: int = 0
    adapter_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyView:
    key_id: str
    """Shown in lists; not secret."""
    tenant: TenantName
    role: Role
    key_sha256: str
    """Hex digest of the whole key. Keys are 256 random bits, so that a plain hash suffices."""
    created_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageRow:
    """What a gateway adds to a tenant's account since its last report."""

    tenant: TenantName
    requests: int
    prompt_tokens: int
    output_tokens: int
