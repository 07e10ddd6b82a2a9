"""Takes the lock that writers of the control database need, as a second controller would."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg


@contextmanager
def locked(database_url: str) -> Iterator[None]:
    """Released at the end, with nothing changed. The database has been opened before."""
    if database_url.startswith("sqlite"):
        file = sqlite3.connect(database_url.removeprefix("sqlite:///"), isolation_level=None)
        file.execute("BEGIN IMMEDIATE")
        yield
        file.execute("ROLLBACK")
        file.close()
        return
    with psycopg.connect(database_url) as connection:
        connection.execute("SELECT epoch FROM cluster FOR UPDATE")
        yield
        connection.rollback()
