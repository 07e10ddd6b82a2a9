"""The declarative base of every table of the control database, and the one table that belongs to none of the parts.

Knows no tenant and no adapter. Imported by the ``tables`` modules of tenancy and registry.
"""

from sqlalchemy import BigInteger, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

SCHEMA_VERSION = 2
"""Grows with every change of a table, and with every new one."""
OLDEST_READABLE_VERSION = 1
"""Databases from here on lack whole tables at most: these are made when they are opened."""


class Base(DeclarativeBase):
    """Parent of all tables."""


class ClusterRow(Base):
    """One row, id 1: what is true of the whole database."""

    __tablename__ = "cluster"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    schema_version: Mapped[int]
    epoch: Mapped[int] = mapped_column(BigInteger)
    """The lease: number of the controller that opened the database last; only that one may write."""
    secret: Mapped[str] = mapped_column(String(128))
    """Shared by gateways and replicas; drawn once."""
