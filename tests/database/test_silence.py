"""A PostgreSQL server that accepts connections and answers nothing: one call waits for it, later ones fail at once, and
all is well when it speaks again."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from loraplex.core.errors import Unavailable
from loraplex.database.base import ClusterRow
from loraplex.database.config import DatabaseConfig
from loraplex.database.database import Database
from sqlalchemy import select, text

from tests.database.lock import locked
from tests.database.postgres import PostgresServer
from tests.database.relay import Relay

pytestmark = [pytest.mark.alone, pytest.mark.parametrize("new_database", ["postgresql"], indirect=True)]
AT_ONCE_S = 0.1


@pytest.fixture
def relay(postgres: PostgresServer) -> Iterator[Relay]:
    relay = Relay(postgres.port)
    yield relay
    relay.close()


@pytest.fixture
def config(postgres: PostgresServer, database_url: str, relay: Relay) -> DatabaseConfig:
    url = postgres.url(database_url.rpartition("/")[2], port=relay.port)
    return DatabaseConfig(url=url, busy_timeout_s=0.2, connect_timeout_s=2.0, answer_timeout_s=2.0)


@pytest.fixture
def database(config: DatabaseConfig) -> Iterator[Database]:
    database = Database(config, directory=Path())
    yield database
    database.close()


def _epoch(database: Database) -> int | None:
    with database.read() as session:
        return session.scalar(select(ClusterRow.epoch))


def _change(database: Database, secret: str) -> None:
    with database.write() as session:
        session.execute(text("UPDATE cluster SET secret = :secret"), {"secret": secret})


def _seconds_of_failure(database: Database) -> float:
    started_s = time.monotonic()
    with pytest.raises(Unavailable, match="does not answer"):
        _epoch(database)
    return time.monotonic() - started_s


def _until_it_answers(database: Database) -> None:
    deadline_s = time.monotonic() + 10
    while True:
        try:
            _change(database, "after")
            return
        except Unavailable:
            assert time.monotonic() < deadline_s
            time.sleep(0.05)


def test_one_call_waits_and_later_ones_fail_at_once_until_it_answers(database: Database, relay: Relay) -> None:
    relay.fall_silent()
    # The open connection is asked first whether it lives, then a new one is tried.
    assert 2.0 < _seconds_of_failure(database) < 6.0
    asked = relay.num_accepted
    deadline_s = time.monotonic() + 10
    while relay.num_accepted == asked:
        assert _seconds_of_failure(database) < AT_ONCE_S
        with pytest.raises(Unavailable, match="does not answer"):
            _change(database, "lost")
        assert time.monotonic() < deadline_s, "it is asked again and again"
        time.sleep(0.05)
    relay.speak()
    _until_it_answers(database)
    assert _epoch(database) == database.epoch == 1


def test_a_database_that_is_silent_when_it_is_opened(config: DatabaseConfig, relay: Relay) -> None:
    relay.fall_silent()
    started_s = time.monotonic()
    with pytest.raises(Unavailable, match="does not answer"):
        Database(config, directory=Path())
    assert time.monotonic() - started_s < 4.0
    assert "database-probe" not in [thread.name for thread in threading.enumerate()]


def test_a_commit_that_meets_the_silence_waits_to_learn_what_became_of_it(database: Database, relay: Relay) -> None:
    outcome: list[str] = []

    def commit() -> None:
        try:
            with database.write() as session:
                session.execute(text("UPDATE cluster SET secret = 'in doubt'"))
                relay.fall_silent()
            outcome.append("committed")
        except Unavailable:
            outcome.append("failed")

    committing = threading.Thread(target=commit)
    committing.start()
    deadline_s = time.monotonic() + 10
    while not database.in_doubt:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    time.sleep(1.0)
    assert not outcome
    relay.speak()
    committing.join(15)
    assert outcome == ["failed"], "the server never heard of the commit"
    _until_it_answers(database)


def test_a_lock_that_is_waited_for_is_no_silence(config: DatabaseConfig, database: Database, database_url: str) -> None:
    patient = Database(DatabaseConfig(url=config.url, busy_timeout_s=1.5, answer_timeout_s=2.0), directory=Path())
    with locked(database_url), pytest.raises(Unavailable):
        _change(patient, "not to be had")
    _change(patient, "there")
    patient.close()
