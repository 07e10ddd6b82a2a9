"""Tables of plans, decisions and replicas. Read and written by ``rows`` alone."""

from sqlalchemy import String, Text
from sqlalchemy.orm import Mapped, mapped_column

from loraplex.database.base import Base


class FleetRow(Base):
    """One row, id 1: counters that never go back, and the plan in force."""

    __tablename__ = "fleet"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    last_replica: Mapped[int]
    last_group: Mapped[int]
    last_version: Mapped[int]
    active_version: Mapped[int]
    """0: the config's plan."""


class PlanRow(Base):
    __tablename__ = "plans"

    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    body: Mapped[str] = mapped_column(Text)
    """The plan, JSON."""
    assigned: Mapped[str | None] = mapped_column(Text)
    """The same with the adapters as they were moved since, JSON; None: as planned."""
    source: Mapped[str] = mapped_column(String(64))
    state: Mapped[str] = mapped_column(String(16))
    created_s: Mapped[float]
    reason: Mapped[str] = mapped_column(Text)
    before: Mapped[int]
    """Version that was in force when this one was applied: what a failure falls back to."""


class DecisionRow(Base):
    __tablename__ = "decisions"

    number: Mapped[int] = mapped_column(primary_key=True)
    at_s: Mapped[float]
    kind: Mapped[str] = mapped_column(String(32))
    plan_version: Mapped[int]
    reason: Mapped[str] = mapped_column(Text)
    attainment_before: Mapped[float | None]
    predicted_gain: Mapped[float | None]
    attainment_after: Mapped[float | None]


class ReplicaRow(Base):
    """From before it is started until its GPUs are free."""

    __tablename__ = "replicas"

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    """In order of their record."""
    replica_id: Mapped[str] = mapped_column(String(300), unique=True)
    state: Mapped[str] = mapped_column(String(16))
    body: Mapped[str] = mapped_column(Text)
    """``state.Replica``, JSON."""


class WokenRow(Base):
    """A base without a group in the plan that was asked for."""

    __tablename__ = "woken_bases"

    base_model_id: Mapped[str] = mapped_column(String(255), primary_key=True)
    woken_s: Mapped[float]
