"""The control database on both servers: lease, isolation of transactions, clear errors."""

import os
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from loraplex.core.errors import BadConfig, StorageFull, Unavailable
from loraplex.database.base import ClusterRow
from loraplex.database.config import DatabaseConfig
from loraplex.database.database import Database
from sqlalchemy import select, text

from tests.database.lock import locked

only_sqlite = pytest.mark.parametrize("new_database", ["sqlite"], indirect=True)


@pytest.fixture
def config(database_url: str) -> DatabaseConfig:
    return DatabaseConfig(url=database_url, busy_timeout_s=0.2)


@pytest.fixture
def database(config: DatabaseConfig) -> Iterator[Database]:
    database = Database(config, directory=Path())
    yield database
    database.close()


def test_each_open_takes_the_next_epoch_and_keeps_the_secret(config: DatabaseConfig) -> None:
    first = Database(config, directory=Path())
    first.close()
    second = Database(config, directory=Path())
    assert (first.epoch, second.epoch) == (1, 2)
    assert first.cluster_secret == second.cluster_secret
    assert len(first.cluster_secret) >= 32
    second.close()


@only_sqlite
def test_file_is_private_and_durable(database_url: str, database: Database) -> None:
    assert stat.S_IMODE(os.stat(database_url.removeprefix("sqlite:///")).st_mode) == 0o600
    with database.write() as session:
        for pragma, value in (("journal_mode", "wal"), ("synchronous", 2), ("foreign_keys", 1), ("busy_timeout", 200)):
            assert session.execute(text(f"PRAGMA {pragma}")).scalar() == value


def test_a_replaced_controller_reads_but_does_not_write(config: DatabaseConfig, database: Database) -> None:
    new = Database(config, directory=Path())
    with pytest.raises(Unavailable, match="newer controller") as caught, database.write():
        pytest.fail("must not be entered")
    assert caught.value.code == "superseded"
    with database.read() as session:
        assert session.scalar(select(ClusterRow.epoch)) == 2
    with new.write() as session:
        assert session.scalar(select(ClusterRow.epoch)) == 2
    new.close()


def test_the_lease_moves_between_two_writes_never_inside_one(config: DatabaseConfig, database: Database) -> None:
    """The old controller is in the middle of a change when the new one comes."""
    patient = DatabaseConfig(url=config.url, busy_timeout_s=10.0)
    opened: list[Database] = []
    opening = threading.Thread(target=lambda: opened.append(Database(patient, directory=Path())))
    with database.write() as session:
        opening.start()
        time.sleep(0.3)
        assert not opened, "the new one waits"
        session.execute(text("UPDATE cluster SET secret = 'of the old one'"))
    opening.join()
    assert opened[0].cluster_secret == "of the old one", "what the old one committed is there"
    with pytest.raises(Unavailable, match="newer controller"), database.write():
        pytest.fail("must not be entered")
    opened[0].close()


def test_two_controllers_never_both_write(config: DatabaseConfig) -> None:
    """Threads that take the lease from each other and write as fast as they can. What a writer commits it has read
    under its own epoch, so the epochs in the order of the commits never fall."""
    patient = DatabaseConfig(url=config.url, busy_timeout_s=20.0)
    setting_up = Database(patient, directory=Path())
    with setting_up.write() as session:
        session.execute(text("CREATE TABLE log (number INTEGER PRIMARY KEY, epoch INTEGER)"))
    setting_up.close()
    ends: list[str] = []
    all_began = threading.Barrier(3)

    def control() -> None:
        for turn in range(4):
            database = Database(patient, directory=Path())
            if turn == 0:  # whoever took the lease last has it, the other two have lost it
                all_began.wait(60)
            try:
                for _ in range(15):
                    with database.write() as session:
                        last = session.execute(text("SELECT coalesce(max(number), 0) FROM log")).scalar_one()
                        values = {"number": last + 1, "epoch": database.epoch}
                        session.execute(text("INSERT INTO log VALUES (:number, :epoch)"), values)
            except Unavailable as error:
                ends.append(str(error.code))
            finally:
                database.close()

    threads = [threading.Thread(target=control) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    last = Database(patient, directory=Path())
    with last.read() as session:
        epochs = session.execute(text("SELECT epoch FROM log ORDER BY number")).scalars().all()
    last.close()
    assert set(ends) == {"superseded"}, "they did meet, and nothing else went wrong"
    assert epochs == sorted(epochs)
    assert last.epoch == 14


def _change_and_fail(database: Database) -> None:
    with database.write() as session:
        session.execute(text("UPDATE cluster SET secret = 'changed'"))
        raise RuntimeError


def test_an_exception_rolls_back(database: Database) -> None:
    with pytest.raises(RuntimeError):
        _change_and_fail(database)
    with database.read() as session:
        assert session.scalar(select(ClusterRow.secret)) == database.cluster_secret


def test_what_a_read_session_changes_is_not_kept(database: Database) -> None:
    with database.read() as session:
        session.execute(text("UPDATE cluster SET secret = 'x'"))
    with database.read() as session:
        assert session.scalar(select(ClusterRow.secret)) == database.cluster_secret


def test_a_read_session_sees_one_state(config: DatabaseConfig, database: Database) -> None:
    with database.read() as session:
        before = session.scalar(select(ClusterRow.epoch))
        other = Database(config, directory=Path())
        assert session.scalar(select(ClusterRow.epoch)) == before
        other.close()
    with database.read() as session:
        assert session.scalar(select(ClusterRow.epoch)) == other.epoch


def test_a_locked_database_is_unavailable_not_a_hang(database_url: str, database: Database) -> None:
    with locked(database_url), pytest.raises(Unavailable) as caught, database.write():
        pytest.fail("must not be entered")
    assert caught.value.message == "the control database does not answer", "drivers name files and hosts"
    with database.write():
        pass


def _outgrow(database: Database) -> None:
    """Ends with the same result code as a full disk: the file may not grow any more."""
    with database.write() as session:
        pages = session.execute(text("PRAGMA page_count")).scalar()
        session.execute(text(f"PRAGMA max_page_count = {pages}"))
        session.execute(text("INSERT INTO ballast VALUES (zeroblob(1000000))"))


@only_sqlite
def test_a_full_disk_is_storage_full_and_leaves_the_old_state(database: Database) -> None:
    with database.write() as session:
        session.execute(text("CREATE TABLE ballast (body BLOB)"))
    with pytest.raises(StorageFull):
        _outgrow(database)
    with database.read() as session:
        assert session.execute(text("SELECT count(*) FROM ballast")).scalar() == 0


@pytest.mark.parametrize("new_database", ["postgresql"], indirect=True)
def test_the_full_disk_of_a_server_is_storage_full(database: Database) -> None:
    """As the server reports it, raised by the server."""
    with pytest.raises(StorageFull), database.write() as session:
        session.execute(text("DO $$ BEGIN RAISE EXCEPTION 'no space left on device' USING ERRCODE = '53100'; END $$"))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("no url", "no SQLAlchemy URL"),
        ("sqlite://", "must name a file"),
        ("sqlite:///:memory:", "must name a file"),
        ("nosuchdb://host/name", "no driver"),
        ("mysql://host/name", "no driver"),
        ("sqlite:////proc/nowhere/control.db", "cannot open"),
    ],
)
def test_a_bad_url_is_a_config_error(url: str, message: str) -> None:
    with pytest.raises(BadConfig, match=message) as caught:
        Database(DatabaseConfig(url=url), directory=Path())
    assert caught.value.param == "database.url"


def test_a_url_from_a_file(database_url: str, tmp_path: Path) -> None:
    file = tmp_path / "url"
    with pytest.raises(BadConfig, match="No such file"):
        Database(DatabaseConfig(url_file=str(file)), directory=Path())
    file.write_text(f"{database_url}\n")
    database = Database(DatabaseConfig(url_file=str(file)), directory=Path())
    assert database.epoch == 1
    database.close()
    with pytest.raises(ValueError, match="exclude"):
        DatabaseConfig(url="sqlite:///x", url_file=str(file))


@pytest.mark.parametrize("new_database", ["postgresql"], indirect=True)
def test_passwords_are_in_no_error_and_no_log(database_url: str, caplog: pytest.LogCaptureFixture) -> None:
    wrong = database_url.replace("pg%20pass", "letmein")
    for url in (wrong, f"{wrong}?sslmode=require", wrong.replace("@127.0.0.1:", "@127.0.0.1:1")):
        with pytest.raises((Unavailable, BadConfig)) as caught:
            Database(DatabaseConfig(url=url, connect_timeout_s=2), directory=Path())
        assert "letmein" not in f"{caught.value}{caught.value.__cause__}{caplog.text}"
    with pytest.raises(BadConfig) as caught:
        Database(DatabaseConfig(url=wrong.replace("@127.0.0.1:", "@127.0.0.1:x")), directory=Path())
    assert "letmein" not in str(caught.value)


@only_sqlite
def test_a_file_that_is_no_database_is_named(database_url: str) -> None:
    path = Path(database_url.removeprefix("sqlite:///"))
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not a database, but long enough to have a header of one hundred bytes" * 50)
    with pytest.raises(BadConfig, match=r"control0\.db is not a control database"):
        Database(DatabaseConfig(url=database_url), directory=Path())
