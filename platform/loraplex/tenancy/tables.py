"""Tables of tenants, keys and usage. Used by ``accounts`` alone; registry tables refer to ``tenants.name``."""

from sqlalchemy import BigInteger, ForeignKey, String
from sqlalchemy.orm import Mapped, mapped_column

from loraplex.database.base import Base


class TenantRow(Base):
    __tablename__ = "tenants"

    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    cache_salt: Mapped[str] = mapped_column(String(64))
    digest_salt: Mapped[str] = mapped_column(String(64))
    """Hex; keys the digests of the tenant's adapters. Never leaves the controller."""
    created_s: Mapped[float]
    requests_per_minute: Mapped[int | None] = mapped_column(BigInteger)
    tokens_per_minute: Mapped[int | None] = mapped_column(BigInteger)
    max_concurrent_requests: Mapped[int | None] = mapped_column(BigInteger)
    max_adapters: Mapped[int | None] = mapped_column(BigInteger)
    max_adapter_bytes: Mapped[int | None] = mapped_column(BigInteger)
    weight: Mapped[int | None] = mapped_column(BigInteger)


class KeyRow(Base):
    __tablename__ = "keys"

    key_id: Mapped[str] = mapped_column(String(32), primary_key=True)
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.name", ondelete="CASCADE"), index=True)
    role: Mapped[str] = mapped_column(String(16))
    key_sha256: Mapped[str] = mapped_column(String(64), unique=True)
    created_s: Mapped[float]


class UsageCounterRow(Base):
    """Its own table: it changes every second, the tenant's row almost never."""

    __tablename__ = "usage"

    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.name", ondelete="CASCADE"), primary_key=True)
    requests: Mapped[int] = mapped_column(BigInteger, default=0)
    prompt_tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    output_tokens: Mapped[int] = mapped_column(BigInteger, default=0)
