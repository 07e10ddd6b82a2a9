"""The control state as one file, and back: all tables of the control database, at one instant.

The file is a zip archive that people can read: ``state.json`` says what it is, ``tables/NAME.jsonl`` has a row a line.
It is written at the schema of its database and read at that schema, then brought to the program's: a backup of an older
program is restored by a newer one, and of one kind of database into the other. Knows no table but ``cluster``.
Called by the CLI; the controller need not be stopped.
"""

import base64
import contextlib
import json
import os
import time
import uuid
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import Connection, MetaData, Table, func, select, text

from loraplex.core.errors import BadConfig, Conflict, InvalidInput, NotFound, StorageFull
from loraplex.database import schema
from loraplex.database.config import DatabaseConfig
from loraplex.database.connection import database_url, make_engine, reading, shown, translated, writing

_FORMAT = "loraplex control state"
_FORMAT_VERSION = 1
_BATCH_ROWS = 1000


class StateFile(msgspec.Struct, frozen=True, kw_only=True):
    """``state.json`` of a backup."""

    format: str
    format_version: int
    revision: str
    """Schema of the rows."""
    created_s: float
    """Unix time."""
    epoch: int
    """Of the controller that led the cluster then."""
    num_rows: dict[str, int]
    """Of each table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    state: StateFile
    epoch: int
    """From which controllers count on: above all that may have led the cluster since the backup."""
    database: str
    """Its URL without the password."""


def back_up(config: DatabaseConfig, *, directory: Path, file: Path, replace: bool = False) -> StateFile:
    """Writes ``file``, readable by its owner alone: it has salts, the cluster secret and the hashes of keys.

    It is there whole or not at all; one that is there already is replaced only if ``replace``. ``directory`` holds the
    default database. Raises BadConfig, NotFound (no database), Conflict, StorageFull, Unavailable.
    """
    if file.exists() and not replace:
        raise Conflict(f"{file} exists; say --replace to write over it")
    with _connected(config, directory, write=False) as (connection, name):
        revision = schema.revision_of(connection)
        if revision is None:
            raise NotFound(f"there is no control state in {name}")
        schema.check_known(revision, what=f"control database {name}")
        tables = _tables(connection, revision)
        temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
        with _written(file, temporary) as archive:
            num_rows = {table.name: _dump(connection, table, archive) for table in tables}
            state = StateFile(
                format=_FORMAT,
                format_version=_FORMAT_VERSION,
                revision=revision,
                created_s=time.time(),
                epoch=connection.scalar(text("SELECT epoch FROM cluster")) or 0,
                num_rows=num_rows,
            )
            archive.writestr("state.json", msgspec.json.format(msgspec.json.encode(state)))
    return state


def restore(config: DatabaseConfig, *, directory: Path, file: Path, replace: bool = False) -> Restored:
    """Fills the database from ``file``, in one transaction.

    A database that holds control state is refused, unless ``replace``: its state is then deleted, and a controller that
    runs on it is fenced out. ``directory`` holds the default database. Raises BadConfig, InvalidInput (no backup, or a
    damaged one), Conflict, StorageFull, Unavailable.
    """
    with _opened(file) as archive:
        state = _read_state(archive, file)
        schema.check_known(state.revision, what=str(file))
        with _connected(config, directory, write=True) as (connection, name):
            old_epoch = _make_room(connection, name, replace=replace)
            schema.upgrade(connection, what=name, target=state.revision)
            for table in _tables(connection, state.revision):
                _fill(connection, table, archive, file, expected=state.num_rows.get(table.name, 0))
            # Replicas and gateways may have heard of controllers that this backup knows nothing of.
            epoch = max(state.epoch, old_epoch, int(time.time()))
            connection.execute(text("UPDATE cluster SET epoch = :epoch"), {"epoch": epoch})
            schema.upgrade(connection, what=name)
    return Restored(state=state, epoch=epoch, database=name)


@contextlib.contextmanager
def _connected(config: DatabaseConfig, directory: Path, *, write: bool) -> Iterator[tuple[Connection, str]]:
    """In one transaction. A SQLite file that is only read is not made."""
    url = database_url(config, directory)
    if not write and url.get_backend_name() == "sqlite" and not Path(str(url.database)).exists():
        raise NotFound(f"there is no control database {shown(url)}")
    engine = make_engine(url, config)
    try:
        with translated(url), (writing(engine) if write else reading(engine)).begin() as connection:
            yield connection, shown(url)
    finally:
        engine.dispose()


def _tables(connection: Connection, revision: str) -> list[Table]:
    """Ours alone, whatever else is in the database; those that others refer to first."""
    metadata = MetaData()
    metadata.reflect(connection, only=sorted(schema.tables_at(revision)))
    return metadata.sorted_tables


@contextlib.contextmanager
def _written(file: Path, temporary: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with open(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as stream:
            with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
                yield archive
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except OSError as error:
        raise StorageFull(f"cannot write {file}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _dump(connection: Connection, table: Table, archive: zipfile.ZipFile) -> int:
    num_rows = 0
    rows = connection.execution_options(yield_per=_BATCH_ROWS).execute(select(table).order_by(*table.primary_key))
    with archive.open(f"tables/{table.name}.jsonl", "w", force_zip64=True) as stream:
        for row in rows.mappings():
            values = {name: _encoded(value) for name, value in row.items()}
            stream.write(json.dumps(values, ensure_ascii=False).encode() + b"\n")
            num_rows += 1
    return num_rows


def _encoded(value: Any) -> Any:
    return {"base64": base64.b64encode(value).decode()} if isinstance(value, bytes) else value


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[zipfile.ZipFile]:
    """InvalidInput for a file that is no whole archive, also when that is found out while it is read."""
    try:
        with zipfile.ZipFile(file) as archive:
            yield archive
    except FileNotFoundError:
        raise NotFound(f"there is no file {file}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError) as error:
        raise InvalidInput(f"{file} is no backup of the control state, or a damaged one: {error}") from error
    except OSError as error:
        raise InvalidInput(f"cannot read {file}: {error.strerror}") from error


def _read_state(archive: zipfile.ZipFile, file: Path) -> StateFile:
    state = msgspec.json.decode(archive.read("state.json"), type=StateFile)
    if state.format != _FORMAT:
        raise InvalidInput(f"{file} is no backup of the control state")
    if state.format_version > _FORMAT_VERSION:
        raise BadConfig(f"{file} has format {state.format_version}; this program reads up to {_FORMAT_VERSION}")
    return state


def _make_room(connection: Connection, name: str, *, replace: bool) -> int:
    """Leaves the database without tables of ours. Returns the epoch that it had, 0 when it had no state."""
    revision = schema.revision_of(connection)
    if revision is None:
        return 0
    schema.check_known(revision, what=name)
    epoch = int(connection.scalar(text("SELECT epoch FROM cluster")) or 0)
    num_tenants = connection.scalar(text("SELECT count(*) FROM tenants"))
    if not replace:
        raise Conflict(f"{name} holds control state ({num_tenants} tenants); say --replace to delete it")
    # Waits for a writer, and keeps others out.
    connection.execute(text("UPDATE cluster SET epoch = epoch + 1"))
    for table in reversed(_tables(connection, revision)):
        table.drop(connection)
    connection.execute(text(f"DROP TABLE IF EXISTS {schema.REVISIONS}"))
    return epoch


def _fill(connection: Connection, table: Table, archive: zipfile.ZipFile, file: Path, *, expected: int) -> None:
    num_rows = 0
    with archive.open(f"tables/{table.name}.jsonl") as stream:
        for batch in _batches(stream):
            connection.execute(table.insert(), batch)
            num_rows += len(batch)
    if num_rows != expected:
        raise InvalidInput(f"{file} is damaged: {num_rows} rows of {table.name} in the place of {expected}")
    if connection.dialect.name == "postgresql":
        _advance_sequence(connection, table)


def _batches(lines: Iterable[bytes]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for line in lines:
        batch.append({name: _decoded(value) for name, value in json.loads(line).items()})
        if len(batch) == _BATCH_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch


def _decoded(value: Any) -> Any:
    return base64.b64decode(value["base64"], validate=True) if isinstance(value, dict) else value


def _advance_sequence(connection: Connection, table: Table) -> None:
    """A column that numbers its rows itself goes on above those that were given."""
    for column in table.primary_key:
        sequence = connection.scalar(select(func.pg_get_serial_sequence(table.name, column.name)))
        highest = connection.scalar(select(func.max(column)))
        if sequence is not None and highest is not None:
            connection.execute(select(func.setval(sequence, highest)))
