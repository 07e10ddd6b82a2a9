"""Tables of adapters, their versions and the artifacts behind them. Read and written by ``registry`` alone."""

from sqlalchemy import BigInteger, ForeignKey, ForeignKeyConstraint, Index, LargeBinary, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from loraplex.database.base import Base


class AdapterRow(Base):
    """A name of a tenant. It outlives its versions, so that a version number is never given twice."""

    __tablename__ = "adapters"

    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.name", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    current_version: Mapped[int | None]
    """The alias; None when every version is deleted."""
    last_version: Mapped[int]


class VersionRow(Base):
    __tablename__ = "adapter_versions"
    __table_args__ = (
        ForeignKeyConstraint(["tenant", "name"], ["adapters.tenant", "adapters.name"], ondelete="CASCADE"),
        UniqueConstraint("tenant", "name", "digest"),
        Index("ix_adapter_versions_digest", "digest"),
    )

    tenant: Mapped[str] = mapped_column(String(63), primary_key=True)
    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    digest: Mapped[str] = mapped_column(ForeignKey("artifacts.digest"))
    created_s: Mapped[float]


class ArtifactRow(Base):
    """One stored file. It refers to no tenant: it stays a while after the last version that names it."""

    __tablename__ = "artifacts"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    content_sha256: Mapped[str] = mapped_column(String(64))
    base_model_id: Mapped[str] = mapped_column(String(255))
    max_lora_rank: Mapped[int]
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    manifest: Mapped[bytes] = mapped_column(LargeBinary)
    """Compressed msgpack of the AdapterManifest: hundreds of blocks that lists never need."""
    released_s: Mapped[float | None] = mapped_column(index=True)
    """Wall clock at which the last version that named it went away; None while one does."""
