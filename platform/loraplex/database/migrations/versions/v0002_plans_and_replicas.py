"""Plans, decisions, replicas and their counters."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "fleet",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("last_replica", sa.Integer, nullable=False),
        sa.Column("last_group", sa.Integer, nullable=False),
        sa.Column("last_version", sa.Integer, nullable=False),
        sa.Column("active_version", sa.Integer, nullable=False),
        if_not_exists=True,
    )
    op.create_table(
        "plans",
        sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("assigned", sa.Text),
        sa.Column("source", sa.String(64), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("created_s", sa.Double, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("before", sa.Integer, nullable=False),
        if_not_exists=True,
    )
    op.create_table(
        "decisions",
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("at_s", sa.Double, nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("plan_version", sa.Integer, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("attainment_before", sa.Double),
        sa.Column("predicted_gain", sa.Double),
        sa.Column("attainment_after", sa.Double),
        if_not_exists=True,
    )
    op.create_table(
        "replicas",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("replica_id", sa.String(300), nullable=False, unique=True),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        if_not_exists=True,
    )
    op.create_table(
        "woken_bases",
        sa.Column("base_model_id", sa.String(255), primary_key=True),
        sa.Column("woken_s", sa.Double, nullable=False),
        if_not_exists=True,
    )
