"""The declarative base of every table of the control database, and the one table that belongs to none of the parts.

Knows no tenant and no adapter. Imported by the ``tables`` modules of tenancy, registry and the controller. A change of
a table is a new step in ``migrations/versions``; a test compares the two.
"""

from sqlalchemy import BigInteger, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """Parent of all tables."""


class ClusterRow(Base):
    """One row, id 1: what is true of the whole database."""

    __tablename__ = "cluster"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    epoch: Mapped[int] = mapped_column(BigInteger)
    """The lease: number of the controller that opened the database last; only that one may write."""
    secret: Mapped[str] = mapped_column(String(128))
    """Shared by gateways and replicas; drawn once."""
