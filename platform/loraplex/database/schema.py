"""The control database's schema and its history: which revision a database has, and the steps to the newest.

The steps are alembic's, in ``migrations/versions``, numbered 0001, 0002, ...; they run inside the caller's
transaction, so a database is at one revision or the next, never between. Used by ``database`` and ``backup``.
"""

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, inspect, text

from loraplex.core.errors import BadConfig

REVISIONS = "alembic_version"
"""The table in which a database's revision stands."""
_LOCATION = "loraplex.database:migrations"
_POSTGRES_LOCK = 0x6C6F7261
"""Advisory; two programs that migrate the same database take turns."""
_BEFORE_MIGRATIONS = {1: "0001", 2: "0002"}
"""``cluster.schema_version`` of databases that were made before there were migrations -> their revision."""


def newest_revision() -> str:
    """Of this program."""
    head = _scripts().get_current_head()
    assert head is not None
    return head


def revision_of(connection: Connection) -> str | None:
    """None: nothing of ours is in the database. Changes nothing."""
    tables = inspect(connection).get_table_names()
    if REVISIONS in tables:
        return MigrationContext.configure(connection).get_current_revision()
    if "cluster" not in tables:
        return None
    version = connection.scalar(text("SELECT schema_version FROM cluster"))
    # Without a row its first opening was cut short: there may be tables, but nothing is in them.
    return None if version is None else _BEFORE_MIGRATIONS.get(version, f"version {version}")


def tables_at(revision: str) -> frozenset[str]:
    """Names of the tables that a database of this revision has, but for alembic's: what the steps build, tried out."""
    engine = create_engine("sqlite://")
    with engine.begin() as connection:
        upgrade(connection, what="a database in memory", target=revision)
        return frozenset(inspect(connection).get_table_names()) - {REVISIONS}


def check_known(revision: str, *, what: str) -> None:
    """Raises BadConfig for a revision that this program does not know: one of a newer program."""
    known = {script.revision for script in _scripts().walk_revisions()}
    if revision not in known:
        raise BadConfig(
            f"{what} has schema {revision}, newer than {newest_revision()}, the newest that this program knows: "
            "use the program that wrote it, or a newer one",
            param="database.url",
        )


def upgrade(connection: Connection, *, what: str, target: str = "head") -> None:
    """Brings the database to ``target`` inside the open transaction of ``connection``. ``what``: its name in errors.

    Raises BadConfig when it is newer than this program; nothing is changed then.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _POSTGRES_LOCK})
    found = revision_of(connection)
    if found is not None:
        check_known(found, what=what)
    config = _config()
    config.attributes["connection"] = connection
    if found is not None and REVISIONS not in inspect(connection).get_table_names():
        command.stamp(config, found)
    command.upgrade(config, target)


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", _LOCATION)
    return config


def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())
