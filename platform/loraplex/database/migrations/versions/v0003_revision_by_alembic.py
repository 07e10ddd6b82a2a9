"""What schema a database has is said by ``alembic_version`` alone."""

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.drop_column("cluster", "schema_version")
