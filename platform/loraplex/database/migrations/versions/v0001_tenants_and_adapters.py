"""Lease, tenants, keys, usage; adapters, versions, artifacts.

A database whose very first opening was cut short may have some of the tables: they are left as they are.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "cluster",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("schema_version", sa.Integer, nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("secret", sa.String(128), nullable=False),
        if_not_exists=True,
    )
    op.create_table(
        "tenants",
        sa.Column("name", sa.String(63), primary_key=True),
        sa.Column("cache_salt", sa.String(64), nullable=False),
        sa.Column("digest_salt", sa.String(64), nullable=False),
        sa.Column("created_s", sa.Double, nullable=False),
        sa.Column("requests_per_minute", sa.BigInteger),
        sa.Column("tokens_per_minute", sa.BigInteger),
        sa.Column("max_concurrent_requests", sa.BigInteger),
        sa.Column("max_adapters", sa.BigInteger),
        sa.Column("max_adapter_bytes", sa.BigInteger),
        if_not_exists=True,
    )
    op.create_table(
        "keys",
        sa.Column("key_id", sa.String(32), primary_key=True),
        sa.Column("tenant", sa.String(63), sa.ForeignKey("tenants.name", ondelete="CASCADE"), nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("key_sha256", sa.String(64), nullable=False, unique=True),
        sa.Column("created_s", sa.Double, nullable=False),
        if_not_exists=True,
    )
    op.create_index("ix_keys_tenant", "keys", ["tenant"], if_not_exists=True)
    op.create_table(
        "usage",
        sa.Column("tenant", sa.String(63), sa.ForeignKey("tenants.name", ondelete="CASCADE"), primary_key=True),
        sa.Column("requests", sa.BigInteger, nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("output_tokens", sa.BigInteger, nullable=False),
        if_not_exists=True,
    )
    op.create_table(
        "adapters",
        sa.Column("tenant", sa.String(63), sa.ForeignKey("tenants.name", ondelete="CASCADE"), primary_key=True),
        sa.Column("name", sa.String(63), primary_key=True),
        sa.Column("current_version", sa.Integer),
        sa.Column("last_version", sa.Integer, nullable=False),
        if_not_exists=True,
    )
    op.create_table(
        "artifacts",
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("content_sha256", sa.String(64), nullable=False),
        sa.Column("base_model_id", sa.String(255), nullable=False),
        sa.Column("max_lora_rank", sa.Integer, nullable=False),
        sa.Column("num_bytes", sa.BigInteger, nullable=False),
        sa.Column("manifest", sa.LargeBinary, nullable=False),
        sa.Column("released_s", sa.Double),
        if_not_exists=True,
    )
    op.create_index("ix_artifacts_released_s", "artifacts", ["released_s"], if_not_exists=True)
    op.create_table(
        "adapter_versions",
        sa.Column("tenant", sa.String(63), primary_key=True),
        sa.Column("name", sa.String(63), primary_key=True),
        sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("digest", sa.String(64), sa.ForeignKey("artifacts.digest"), nullable=False),
        sa.Column("created_s", sa.Double, nullable=False),
        sa.ForeignKeyConstraint(["tenant", "name"], ["adapters.tenant", "adapters.name"], ondelete="CASCADE"),
        sa.UniqueConstraint("tenant", "name", "digest"),
        if_not_exists=True,
    )
    op.create_index("ix_adapter_versions_digest", "adapter_versions", ["digest"], if_not_exists=True)
