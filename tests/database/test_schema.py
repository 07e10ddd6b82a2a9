"""Migrations: what they build is what the tables say; old databases are brought up to date, newer ones are refused."""

import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from loraplex.controller.fleet.rows import FleetRows
from loraplex.core.errors import BadConfig, Unavailable
from loraplex.core.ids import Digest
from loraplex.core.tenant import TenantLimits
from loraplex.database.base import Base
from loraplex.database.config import DatabaseConfig
from loraplex.database.connection import database_url as parsed
from loraplex.database.connection import make_engine, writing
from loraplex.database.database import Database
from loraplex.database.schema import newest_revision, upgrade
from loraplex.tenancy.keys import hash_key
from sqlalchemy import Engine, inspect, text

from tests.database.catalogs import ACME, OLD, open_catalog


def _engine(url: str) -> Engine:
    config = DatabaseConfig(url=url, busy_timeout_s=10)
    return make_engine(parsed(config, Path()), config)


def test_the_migrations_build_what_the_tables_say(database_url: str) -> None:
    Database(DatabaseConfig(url=database_url), directory=Path()).close()
    engine = _engine(database_url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
        assert context.get_current_revision() == newest_revision()
        assert len(inspect(connection).get_table_names()) == len(Base.metadata.tables) + 1
    engine.dispose()


@pytest.mark.parametrize("new_database", ["sqlite"], indirect=True)
@pytest.mark.parametrize("version", [1, 2])
def test_a_file_from_before_migrations(database_url: str, tmp_path: Path, version: int) -> None:
    file = Path(database_url.removeprefix("sqlite:///"))
    file.parent.mkdir(parents=True)
    with sqlite3.connect(file) as connection:
        connection.executescript((OLD / f"version_{version}.sql").read_text())
        secret = connection.execute("SELECT secret FROM cluster").fetchone()[0]
        digests = [row[0] for row in connection.execute("SELECT digest FROM adapter_versions ORDER BY version")]
    catalog = open_catalog(database_url, tmp_path)
    assert catalog.epoch == 2, "it goes on counting"
    assert catalog.cluster_secret == secret
    view = catalog.view()
    assert [tenant.name for tenant in view.tenants] == ["acme", "globex"]
    assert view.limits[ACME] == TenantLimits(requests_per_minute=60)
    assert [(key.tenant, key.key_sha256) for key in view.keys] == [(ACME, hash_key("lpx_" + "a" * 43))]
    assert [(one.ref.name, one.ref.version, one.ref.digest, one.current) for one in view.adapters] == [
        ("sql", 1, digests[0], False),
        ("sql", 2, digests[1], True),
    ]
    assert catalog.artifact(Digest(digests[1])).manifest.digest == digests[1]
    assert catalog.usage(ACME).output_tokens == 5
    rows = FleetRows()
    plans = catalog.read_session(lambda session: rows.plans(session, 10))
    assert [plan.plan.version for plan in plans] == ([1] if version == 2 else [])
    replicas = catalog.read_session(rows.replicas)
    assert [replica.target.replica_id for replica in replicas] == (["tiny-1"] if version == 2 else [])
    catalog.create_tenant("initech", TenantLimits())
    catalog.close()
    again = open_catalog(database_url, tmp_path)
    assert len(again.view().tenants) == 3
    again.close()
    _compare_with_new(database_url, f"sqlite:///{tmp_path}/new.db")


def _compare_with_new(old_url: str, new_url: str) -> None:
    """Columns, keys and indexes, in whatever way the database came to them."""
    Database(DatabaseConfig(url=new_url), directory=Path()).close()
    shapes = []
    for url in (old_url, new_url):
        engine = _engine(url)
        found = inspect(engine)
        shapes.append(
            {
                table: (
                    [(column["name"], str(column["type"]), column["nullable"]) for column in found.get_columns(table)],
                    found.get_pk_constraint(table)["constrained_columns"],
                    sorted(str(key["referred_table"]) for key in found.get_foreign_keys(table)),
                    sorted(str(index["name"]) for index in found.get_indexes(table)),
                    sorted(str(one["column_names"]) for one in found.get_unique_constraints(table)),
                )
                for table in found.get_table_names()
            }
        )
        engine.dispose()
    assert shapes[0] == shapes[1]


def test_a_first_opening_that_was_cut_short_is_made_good(database_url: str) -> None:
    """Programs before migrations made their tables one by one, and the row of the lease last."""
    engine = _engine(database_url)
    with writing(engine).begin() as connection:
        connection.execute(
            text("CREATE TABLE cluster (id INTEGER PRIMARY KEY, schema_version INTEGER, epoch BIGINT, secret VARCHAR)")
        )
    engine.dispose()
    database = Database(DatabaseConfig(url=database_url), directory=Path())
    assert database.epoch == 1
    database.close()


def test_a_newer_database_is_refused_and_left_alone(database_url: str) -> None:
    Database(DatabaseConfig(url=database_url), directory=Path()).close()
    engine = _engine(database_url)
    with writing(engine).begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(BadConfig, match=rf"has schema 9999, newer than {newest_revision()}") as caught:
        Database(DatabaseConfig(url=database_url), directory=Path())
    assert "\n" not in str(caught.value)
    assert "pass%2Fword" not in str(caught.value)
    assert "***" in str(caught.value) or database_url.startswith("sqlite")
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT epoch FROM cluster")) == 1
    engine.dispose()


@pytest.mark.parametrize("new_database", ["sqlite"], indirect=True)
def test_a_newer_database_from_before_migrations_is_refused(database_url: str, tmp_path: Path) -> None:
    file = Path(database_url.removeprefix("sqlite:///"))
    file.parent.mkdir(parents=True)
    with sqlite3.connect(file) as connection:
        connection.executescript((OLD / "version_2.sql").read_text())
        connection.execute("UPDATE cluster SET schema_version = 3")
    with pytest.raises(BadConfig, match="has schema version 3, newer than"):
        Database(DatabaseConfig(url=database_url), directory=tmp_path)


def test_a_step_that_fails_changes_nothing(database_url: str) -> None:
    """All steps to the newest are one transaction, on both kinds of database."""
    engine = _engine(database_url)
    with writing(engine).begin() as connection:
        upgrade(connection, what="it", target="0002")
    with writing(engine).begin() as connection:
        # In the way of the next step.
        connection.execute(text("ALTER TABLE cluster DROP COLUMN schema_version"))
    with pytest.raises(Unavailable):
        Database(DatabaseConfig(url=database_url), directory=Path())
    with engine.connect() as connection:
        assert MigrationContext.configure(connection).get_current_revision() == "0002"
        assert connection.scalar(text("SELECT count(*) FROM cluster")) == 0
    engine.dispose()


def test_programs_that_start_together_migrate_once(new_database: Callable[[], str]) -> None:
    config = DatabaseConfig(url=new_database(), busy_timeout_s=30)
    epochs: list[int] = []

    def open_it() -> None:
        database = Database(config, directory=Path())
        epochs.append(database.epoch)
        database.close()

    threads = [threading.Thread(target=open_it) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(epochs) == [1, 2, 3, 4]
