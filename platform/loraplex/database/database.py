"""Owns the SQLAlchemy engine, hands out read and write sessions, and fences out a controller that was replaced.

Knows no tables but ``cluster``; callers import the modules that define the others before they open. Not async and not
shared between threads: the controller calls it from its one database thread.
"""

import logging
import os
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect, select
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.orm import Session, sessionmaker

from loraplex.core.errors import BadConfig, StorageFull, Unavailable
from loraplex.database.base import OLDEST_READABLE_VERSION, SCHEMA_VERSION, Base, ClusterRow
from loraplex.database.config import DatabaseConfig

logger = logging.getLogger(__name__)

_POSTGRES_DISK_FULL = "53100"


class Database:
    """An open control database, leased by this process under ``epoch``."""

    def __init__(self, config: DatabaseConfig, *, directory: Path) -> None:
        """Creates what is missing, checks the schema version, takes the lease. ``directory`` holds the default file.

        Raises BadConfig (URL, not a database, made by a newer program), StorageFull, Unavailable.
        """
        self._url = _parse_url(config.url or f"sqlite:///{directory / 'control.db'}")
        self._engine = _make_engine(self._url, config.busy_timeout_s)
        self._read_sessions = sessionmaker(self._engine, expire_on_commit=False)
        self._write_sessions = sessionmaker(
            self._engine.execution_options(loraplex_write=True),
            expire_on_commit=False,
        )
        self.epoch = 0
        self.cluster_secret = ""
        try:
            with self._translated():
                self._check_schema_version()
                Base.metadata.create_all(self._engine)
                self._take_lease()
        except BaseException:
            self._engine.dispose()
            raise

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A consistent view; nothing that is changed in it is kept."""
        with self._translated(), self._read_sessions() as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """One transaction: committed on return, rolled back on any exception.

        Raises Unavailable when a newer controller holds the lease, StorageFull when the disk is full.
        """
        with self._translated(), self._write_sessions.begin() as session:
            # FOR UPDATE (ignored by SQLite, whose BEGIN IMMEDIATE does the same) makes writers of two controllers
            # queue here, so that none commits after the lease has moved.
            held = session.scalar(select(ClusterRow.epoch).where(ClusterRow.id == 1).with_for_update())
            if held != self.epoch:
                raise Unavailable(
                    f"a newer controller (epoch {held}) holds the control database; "
                    f"this one (epoch {self.epoch}) stopped writing",
                    code="superseded",
                )
            yield session

    def close(self) -> None:
        self._engine.dispose()

    def _check_schema_version(self) -> None:
        if not inspect(self._engine).has_table(ClusterRow.__tablename__):
            return
        with self._read_sessions() as session:
            found = session.scalar(select(ClusterRow.schema_version).where(ClusterRow.id == 1))
        if found is not None and not OLDEST_READABLE_VERSION <= found <= SCHEMA_VERSION:
            relation = "newer" if found > SCHEMA_VERSION else "older"
            raise BadConfig(
                f"control database {self._shown_url} has schema version {found}, {relation} than "
                f"versions {OLDEST_READABLE_VERSION} to {SCHEMA_VERSION} that this program reads",
                param="database.url",
            )

    def _take_lease(self) -> None:
        with self._write_sessions.begin() as session:
            row = session.get(ClusterRow, 1, with_for_update=True)
            if row is None:
                row = ClusterRow(id=1, schema_version=SCHEMA_VERSION, epoch=0, secret=secrets.token_urlsafe(32))
                session.add(row)
            row.schema_version = SCHEMA_VERSION
            row.epoch += 1
            self.epoch, self.cluster_secret = row.epoch, row.secret

    @property
    def _shown_url(self) -> str:
        return self._url.render_as_string(hide_password=True)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            origin = error.orig
            sqlite_code = getattr(origin, "sqlite_errorcode", None)
            if sqlite_code == sqlite3.SQLITE_FULL or getattr(origin, "sqlstate", None) == _POSTGRES_DISK_FULL:
                raise StorageFull("the disk of the control database is full") from error
            if sqlite_code is not None and sqlite_code & 0xFF in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
                raise BadConfig(
                    f"{self._shown_url} is not a control database: {origin}", param="database.url"
                ) from error
            # Tenants read the message, and drivers name hosts and files.
            logger.warning("the control database does not answer: %s", origin)
            raise Unavailable("the control database does not answer") from error


def _parse_url(text: str) -> URL:
    try:
        return make_url(text)
    except ArgumentError as error:
        raise BadConfig("database.url is no SQLAlchemy URL", param="database.url") from error


def _make_engine(url: URL, busy_timeout_s: float) -> Engine:
    try:
        if url.get_backend_name() != "sqlite":
            return create_engine(url, pool_pre_ping=True)
        _prepare_sqlite_file(url)
        engine = create_engine(url, connect_args={"timeout": busy_timeout_s})
    except (NoSuchModuleError, ModuleNotFoundError) as error:
        raise BadConfig(f"no driver for database.url: {error}", param="database.url") from error
    event.listen(engine, "connect", _set_up_sqlite_connection)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite_file(url: URL) -> None:
    if not url.database or url.database == ":memory:":
        raise BadConfig(
            "database.url must name a file: an in-memory database would lose all tenants", param="database.url"
        )
    path = Path(url.database)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # SQLite gives its side files the mode of the main file; it holds salts and the cluster secret.
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        raise BadConfig(f"cannot open the control database {path}: {error.strerror}", param="database.url") from error


def _set_up_sqlite_connection(connection: Any, _record: Any) -> None:
    # The driver must not open transactions by itself: ``_begin_sqlite`` says which kind.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("loraplex_write", False)
    # A write transaction takes its lock at once: upgrading a read lock later can fail without waiting.
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
