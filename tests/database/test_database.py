"""The control database: lease, schema version, isolation of transactions, clear errors."""

import os
import sqlite3
import stat
from pathlib import Path

import pytest
from loraplex.core.errors import BadConfig, StorageFull, Unavailable
from loraplex.database.base import OLDEST_READABLE_VERSION, SCHEMA_VERSION, ClusterRow
from loraplex.database.config import DatabaseConfig
from loraplex.database.database import Database
from sqlalchemy import select, text


@pytest.fixture
def config(tmp_path: Path) -> DatabaseConfig:
    return DatabaseConfig(url=f"sqlite:///{tmp_path}/deep/er/control.db", busy_timeout_s=0.2)


def _path(config: DatabaseConfig) -> str:
    assert config.url is not None
    return config.url.removeprefix("sqlite:///")


def test_each_open_takes_the_next_epoch_and_keeps_the_secret(config: DatabaseConfig) -> None:
    first = Database(config, directory=Path())
    first.close()
    second = Database(config, directory=Path())
    assert (first.epoch, second.epoch) == (1, 2)
    assert first.cluster_secret == second.cluster_secret
    assert len(first.cluster_secret) >= 32
    second.close()


def test_file_is_private_and_durable(config: DatabaseConfig) -> None:
    database = Database(config, directory=Path())
    assert stat.S_IMODE(os.stat(_path(config)).st_mode) == 0o600
    with database.write() as session:
        for pragma, value in (("journal_mode", "wal"), ("synchronous", 2), ("foreign_keys", 1), ("busy_timeout", 200)):
            assert session.execute(text(f"PRAGMA {pragma}")).scalar() == value
    database.close()


def test_a_replaced_controller_reads_but_does_not_write(config: DatabaseConfig) -> None:
    old = Database(config, directory=Path())
    new = Database(config, directory=Path())
    with pytest.raises(Unavailable, match="newer controller") as caught, old.write():
        pytest.fail("must not be entered")
    assert caught.value.code == "superseded"
    with old.read() as session:
        assert session.scalar(select(ClusterRow.epoch)) == 2
    with new.write() as session:
        assert session.scalar(select(ClusterRow.epoch)) == 2
    old.close()
    new.close()


def _change_and_fail(database: Database) -> None:
    with database.write() as session:
        session.execute(text("UPDATE cluster SET secret = 'changed'"))
        raise RuntimeError


def test_an_exception_rolls_back(config: DatabaseConfig) -> None:
    database = Database(config, directory=Path())
    with pytest.raises(RuntimeError):
        _change_and_fail(database)
    with database.read() as session:
        assert session.scalar(select(ClusterRow.secret)) == database.cluster_secret
    database.close()


def test_what_a_read_session_changes_is_not_kept(config: DatabaseConfig) -> None:
    database = Database(config, directory=Path())
    with database.read() as session:
        session.execute(text("UPDATE cluster SET secret = 'x'"))
    with database.read() as session:
        assert session.scalar(select(ClusterRow.secret)) == database.cluster_secret
    database.close()


@pytest.mark.parametrize(
    ("version", "relation"), [(SCHEMA_VERSION + 1, "newer"), (OLDEST_READABLE_VERSION - 1, "older")]
)
def test_another_schema_version_is_refused(config: DatabaseConfig, version: int, relation: str) -> None:
    Database(config, directory=Path()).close()
    with sqlite3.connect(_path(config)) as connection:
        connection.execute("UPDATE cluster SET schema_version = ?", (version,))
    with pytest.raises(BadConfig, match=rf"schema version {version}, {relation}"):
        Database(config, directory=Path())


def test_a_locked_database_is_unavailable_not_a_hang(config: DatabaseConfig) -> None:
    database = Database(config, directory=Path())
    other = sqlite3.connect(_path(config), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable) as caught, database.write():
        pytest.fail("must not be entered")
    assert caught.value.message == "the control database does not answer", "drivers name files and hosts"
    other.execute("ROLLBACK")
    with database.write():
        pass
    other.close()
    database.close()


def _outgrow(database: Database) -> None:
    """Ends with the same result code as a full disk: the file may not grow any more."""
    with database.write() as session:
        pages = session.execute(text("PRAGMA page_count")).scalar()
        session.execute(text(f"PRAGMA max_page_count = {pages}"))
        session.execute(text("INSERT INTO ballast VALUES (zeroblob(1000000))"))


def test_a_full_disk_is_storage_full_and_leaves_the_old_state(config: DatabaseConfig) -> None:
    database = Database(config, directory=Path())
    with database.write() as session:
        session.execute(text("CREATE TABLE ballast (body BLOB)"))
    with pytest.raises(StorageFull):
        _outgrow(database)
    with database.read() as session:
        assert session.execute(text("SELECT count(*) FROM ballast")).scalar() == 0
    database.close()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("no url", "no SQLAlchemy URL"),
        ("sqlite://", "must name a file"),
        ("sqlite:///:memory:", "must name a file"),
        ("nosuchdb://host/name", "no driver"),
        ("sqlite:////proc/nowhere/control.db", "cannot open"),
    ],
)
def test_a_bad_url_is_a_config_error(url: str, message: str) -> None:
    with pytest.raises(BadConfig, match=message) as caught:
        Database(DatabaseConfig(url=url), directory=Path())
    assert caught.value.param == "database.url"


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "control.db"
    path.write_bytes(b"not a database, but long enough to have a header of one hundred bytes" * 50)
    with pytest.raises(BadConfig, match=r"control\.db is not a control database"):
        Database(DatabaseConfig(url=f"sqlite:///{path}"), directory=Path())
