"""Owns the SQLAlchemy engine, hands out read and write sessions, and fences out a controller that was replaced.

Knows no tables but ``cluster``. Not async and not shared between threads: the controller calls it from its one database
thread; ``in_doubt`` and ``give_up`` alone are for any thread.
"""

import logging
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, sessionmaker

from loraplex.core.errors import Unavailable
from loraplex.database import schema
from loraplex.database.base import ClusterRow
from loraplex.database.config import DatabaseConfig
from loraplex.database.connection import database_url, make_engine, reading, shown, translated, writing
from loraplex.database.silence import Silence

logger = logging.getLogger(__name__)

_DOUBT_POLL_S = 0.2


class Database:
    """An open control database, leased by this process under ``epoch``."""

    def __init__(self, config: DatabaseConfig, *, directory: Path) -> None:
        """Brings the schema to this program's, makes what is missing, takes the lease: all in one transaction.
        ``directory`` holds the default file.

        Raises BadConfig (URL, not a database, made by a newer program), StorageFull, Unavailable.
        """
        self._url = database_url(config, directory)
        self._engine = make_engine(self._url, config)
        self._read_sessions = sessionmaker(reading(self._engine), expire_on_commit=False)
        self._write_sessions = sessionmaker(writing(self._engine), expire_on_commit=False)
        # PostgreSQL tells afterwards what became of a transaction; a SQLite file cannot be away at its commit.
        self._has_transaction_ids = self._engine.dialect.name == "postgresql"
        self._doubt = threading.Event()
        self._given_up = threading.Event()
        try:
            with translated(self._url), self._write_sessions.begin() as session:
                schema.upgrade(session.connection(), what=f"control database {shown(self._url)}")
                row = session.get(ClusterRow, 1, with_for_update=True)
                if row is None:
                    row = ClusterRow(id=1, epoch=0, secret=secrets.token_urlsafe(32))
                    session.add(row)
                row.epoch += 1
                self.epoch, self.cluster_secret = row.epoch, row.secret
        except BaseException:
            self._engine.dispose()
            raise
        self._silence = Silence(self._engine)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A consistent view; nothing that is changed in it is kept. Raises Unavailable."""
        self._silence.check()
        with translated(self._url), self._read_sessions() as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """One transaction: committed on return, rolled back on any exception.

        When the database goes away during the commit, waits until it is back and says which of the two happened.
        Raises Unavailable when a newer controller holds the lease (code ``superseded``) or the database does not
        answer, StorageFull when the disk is full.
        """
        self._silence.check()
        with translated(self._url), self._write_sessions() as session:
            # FOR UPDATE (ignored by SQLite, whose BEGIN IMMEDIATE does the same) makes writers of two controllers
            # queue here, so that none commits after the lease has moved.
            held = session.scalar(select(ClusterRow.epoch).where(ClusterRow.id == 1).with_for_update())
            if held != self.epoch:
                raise Unavailable(
                    f"a newer controller (epoch {held}) holds the control database; "
                    f"this one (epoch {self.epoch}) stopped writing",
                    code="superseded",
                )
            transaction = (
                session.scalar(select(text("pg_current_xact_id()::text"))) if self._has_transaction_ids else ""
            )
            yield session
            try:
                session.commit()
            except DBAPIError:
                if not transaction or not self._was_committed(transaction):
                    raise

    @property
    def in_doubt(self) -> bool:
        """The database went away during a commit, and whoever asked for it waits to learn what became of it."""
        return self._doubt.is_set()

    def give_up(self) -> None:
        """A commit in doubt fails as Unavailable now, as later ones will, although it may have happened: for an owner
        that forgets all it knows."""
        self._given_up.set()

    def close(self) -> None:
        self._silence.close()
        self._engine.dispose()

    def _was_committed(self, transaction: str) -> bool:
        """``transaction``: its PostgreSQL id. Blocks while the server is away or has not made up its mind."""
        logger.warning("the control database went away during a commit; waiting to learn whether it happened")
        self._doubt.set()
        try:
            while not self._given_up.is_set():
                if self._silence.lasts:
                    self._given_up.wait(_DOUBT_POLL_S)
                    continue
                try:
                    with self._read_sessions() as session:
                        state = session.scalar(select(func.pg_xact_status(text(f"'{int(transaction)}'::xid8"))))
                except DBAPIError as error:
                    if getattr(error.orig, "sqlstate", None) == "22023":
                        return False  # a server that took over and has never heard of it
                else:
                    if state != "in progress":
                        logger.warning("the commit in doubt: %s", state)
                        return bool(state == "committed")
                self._given_up.wait(_DOUBT_POLL_S)
            raise Unavailable("the control database does not answer")
        finally:
            self._doubt.clear()
