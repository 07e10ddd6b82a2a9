"""Opens the control database's URL: drivers, time limits, the kind of transaction, and what driver errors mean.

Knows no table. Used by ``database`` and ``backup``.
"""

import logging
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

from loraplex.core.errors import BadConfig, StorageFull, Unavailable
from loraplex.database.config import DatabaseConfig
from loraplex.database.silence import PatientConnection, connect_patiently

logger = logging.getLogger(__name__)

_POSTGRES_DISK_FULL = "53100"
_POSTGRES_DRIVER = "postgresql+psycopg"
_KEEPALIVES = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}
"""A host that is gone without a word is noticed within half a minute."""
_IDLE_TRANSACTION_S = 60
"""After that a controller that hangs inside a transaction loses it, and the next one is not kept waiting."""


def database_url(config: DatabaseConfig, directory: Path) -> URL:
    """``directory`` holds the default file. Raises BadConfig, which never shows the URL."""
    try:
        url = make_url(config.url_text(directory))
    except (ArgumentError, ValueError):
        raise BadConfig("database.url is no SQLAlchemy URL", param="database.url") from None
    backend = url.get_backend_name()
    if backend == "sqlite":
        if not url.database or url.database == ":memory:":
            raise BadConfig(
                "database.url must name a file: an in-memory database would lose all tenants", param="database.url"
            )
        return url
    if backend not in ("postgresql", "postgres") or url.drivername not in ("postgres", "postgresql", _POSTGRES_DRIVER):
        raise BadConfig(
            f"database.url: no driver for {url.drivername!r}; sqlite:///FILE or postgresql://USER@HOST/NAME is meant",
            param="database.url",
        )
    return url.set(drivername=_POSTGRES_DRIVER)


def make_engine(url: URL, config: DatabaseConfig) -> Engine:
    """Its transactions only read; with the execution option ``loraplex_write`` they write. Connects on first use.

    A SQLite file is created. Raises BadConfig.
    """
    if url.get_backend_name() == "sqlite":
        _prepare_sqlite_file(url)
        engine = create_engine(url, connect_args={"timeout": config.busy_timeout_s})
        event.listen(engine, "connect", _set_up_sqlite_connection)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    timeouts = {"connect_timeout": int(config.connect_timeout_s)} | _KEEPALIVES
    timeouts["tcp_user_timeout"] = int(config.answer_timeout_s * 1000)
    # What the URL says of these comes first.
    arguments = {name: value for name, value in timeouts.items() if name not in url.query}
    engine = create_engine(url, pool_pre_ping=True, connect_args=arguments)
    # A lock may be waited for as long as a statement is allowed to.
    answer_timeout_s = config.busy_timeout_s + config.answer_timeout_s

    def connect(_dialect: Any, _record: Any, arguments: Any, parameters: Any) -> PatientConnection:
        return connect_patiently(*arguments, answer_timeout_s=answer_timeout_s, **parameters)

    lock_timeout_ms = int(config.busy_timeout_s * 1000)

    def set_up(connection: Any, _record: Any) -> None:
        # Not as startup options: connection poolers refuse those.
        with connection.cursor() as cursor:
            cursor.execute(f"SET lock_timeout = {lock_timeout_ms}")
            cursor.execute(f"SET idle_in_transaction_session_timeout = '{_IDLE_TRANSACTION_S}s'")
            cursor.execute(
                "SET tcp_keepalives_idle = 10; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3"
            )
        connection.commit()

    event.listen(engine, "do_connect", connect)
    event.listen(engine, "connect", set_up)
    return engine


def reading(engine: Engine) -> Engine:
    """For transactions that see one state of the database from their first statement to the end."""
    if engine.dialect.name == "sqlite":
        return engine
    return engine.execution_options(isolation_level="REPEATABLE READ")


def writing(engine: Engine) -> Engine:
    """For transactions that are the only ones to write: SQLite gives them its lock at once; on PostgreSQL they lock the
    row of the lease, and must see what was committed while they waited for it."""
    return engine.execution_options(loraplex_write=True)


def shown(url: URL) -> str:
    """Without the password, which may also stand among the options."""
    return url.set(query={}).render_as_string(hide_password=True)


@contextmanager
def translated(url: URL) -> Iterator[None]:
    """StorageFull, BadConfig (no database) or Unavailable in the place of driver errors."""
    try:
        yield
    except DBAPIError as error:
        origin = error.orig
        sqlite_code = getattr(origin, "sqlite_errorcode", None)
        if sqlite_code == sqlite3.SQLITE_FULL or getattr(origin, "sqlstate", None) == _POSTGRES_DISK_FULL:
            raise StorageFull("the disk of the control database is full") from error
        if sqlite_code is not None and sqlite_code & 0xFF in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
            raise BadConfig(f"{shown(url)} is not a control database: {origin}", param="database.url") from error
        # Tenants read the message, and drivers name hosts and files.
        logger.warning("the control database does not answer: %s", " ".join(str(origin).split()))
        raise Unavailable("the control database does not answer") from error


def _prepare_sqlite_file(url: URL) -> None:
    path = Path(str(url.database))
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
