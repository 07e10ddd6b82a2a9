"""Backup and restore: from each kind of database into each kind, by newer programs, and nothing half-way."""

import json
import os
import sqlite3
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from loraplex.cli.main import app
from loraplex.controller.catalog import Catalog
from loraplex.controller.fleet.rows import FleetRows
from loraplex.core.adapter import AdapterBlock, AdapterManifest
from loraplex.core.errors import BadConfig, Conflict, InvalidInput, LoraplexError, NotFound, Unavailable
from loraplex.core.ids import BaseModelId, Digest
from loraplex.core.plan import BasePlacement, GroupPlan, Plan, Shape
from loraplex.core.rollout import DecisionKind, DecisionRecord, PlanState
from loraplex.core.tenant import Role, TenantLimits, UsageRow
from loraplex.database.backup import back_up, restore
from loraplex.database.config import DatabaseConfig
from loraplex.database.connection import database_url as parsed
from loraplex.database.connection import make_engine, writing
from loraplex.database.schema import newest_revision
from loraplex.registry.intake import CheckedAdapter
from sqlalchemy import text
from sqlalchemy.orm import Session
from typer.testing import CliRunner

from tests.database.catalogs import ACME, OLD, open_catalog
from tests.database.postgres import PostgresServer


def _fill(catalog: Catalog) -> None:
    """Something in every table."""
    catalog.create_tenant("acme", TenantLimits(requests_per_minute=60))
    catalog.create_tenant("globex", TenantLimits())
    catalog.create_key(ACME, Role.TENANT_ADMIN)
    catalog.add_usage((UsageRow(tenant=ACME, requests=3, prompt_tokens=2**40, output_tokens=5),))
    for letter in "ab":
        blocks = (AdapterBlock(layer=0, module="q_proj", lora_rank=4, scale=0.1),)
        manifest = AdapterManifest(
            digest=Digest(letter * 64), base_model_id=BaseModelId("tiny"), blocks=blocks, num_bytes=2**33
        )
        catalog.publish_adapter(ACME, "süß", CheckedAdapter(manifest=manifest, content_sha256=letter * 64))
    catalog.set_current(ACME, "süß", 1)
    catalog.write_session(_fill_fleet)


def _fill_fleet(session: Session) -> None:
    rows = FleetRows()
    bases = (BasePlacement(base_model_id=BaseModelId("tiny")),)
    plan = Plan(version=7, groups=(GroupPlan(name="first", shape=Shape(), bases=bases),))
    rows.add_plan(session, plan, source="admin", state=PlanState.APPLYING, reason="two\nlines", at_s=0.1 + 0.2)
    rows.activate(session, 7, PlanState.SETTLED)
    _decide(session)
    rows.wake(session, BaseModelId("tiny"), 5.0)


def _decide(session: Session) -> int:
    record = DecisionRecord(
        number=0,
        at_s=1.5,
        kind=DecisionKind.APPLIED,
        plan_version=7,
        reason="",
        attainment_before=None,
        predicted_gain=1e-9,
    )
    return FleetRows().add_decision(session, record).number


def _rows(url: str) -> dict[str, list[tuple[object, ...]]]:
    config = DatabaseConfig(url=url)
    engine = make_engine(parsed(config, Path()), config)
    tables = ("tenants", "keys", "usage", "adapters", "adapter_versions", "artifacts", "fleet", "plans", "decisions")
    with engine.connect() as connection:
        found = {}
        for table in (*tables, "replicas", "woken_bases"):
            result = connection.execute(text(f"SELECT * FROM {table}"))
            found[table] = sorted((tuple(sorted(row.items())) for row in result.mappings()), key=str)
    engine.dispose()
    return found


@pytest.mark.parametrize("into", ["sqlite", "postgresql"])
def test_there_and_back(
    database_url: str, into: str, postgres: PostgresServer, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A running controller is backed up; the copy is the same in every row, and works."""
    running = open_catalog(database_url, tmp_path)
    _fill(running)
    file = tmp_path / "state.zip"
    state = back_up(DatabaseConfig(url=database_url), directory=Path(), file=file)
    assert state.num_rows["tenants"] == 2
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    running.create_tenant("later", TenantLimits())
    before = _rows(database_url)
    before["tenants"] = [row for row in before["tenants"] if ("name", "later") not in row]
    before["usage"] = [row for row in before["usage"] if ("tenant", "later") not in row]

    target = f"sqlite:///{tmp_path}/copy.db" if into == "sqlite" else postgres.create_database()
    if into == "postgresql":
        request.addfinalizer(lambda: postgres.drop_database(target))
    restored = restore(DatabaseConfig(url=target), directory=Path(), file=file)
    assert restored.state == state
    assert _rows(target) == before
    catalog = open_catalog(target, tmp_path)
    assert catalog.cluster_secret == running.cluster_secret, "replicas that run are recognised"
    assert catalog.epoch > max(running.epoch, 1_700_000_000), "above every epoch that there may have been since"
    assert catalog.artifact(Digest("a" * 64)).manifest.num_bytes == 2**33
    assert catalog.write_session(_decide) == 2, "numbers go on"
    catalog.create_key(ACME, Role.MEMBER)
    catalog.close()
    running.close()


def test_state_is_not_written_over_unless_asked(database_url: str, tmp_path: Path) -> None:
    catalog = open_catalog(database_url, tmp_path)
    catalog.create_tenant("acme", TenantLimits())
    config, file = DatabaseConfig(url=database_url), tmp_path / "state.zip"
    back_up(config, directory=Path(), file=file)
    with pytest.raises(Conflict, match=r"exists; say --replace"):
        back_up(config, directory=Path(), file=file)
    catalog.create_tenant("globex", TenantLimits())
    with pytest.raises(Conflict, match=r"holds control state \(2 tenants\); say --replace"):
        restore(config, directory=Path(), file=file)
    restore(config, directory=Path(), file=file, replace=True)
    with pytest.raises(Unavailable) as caught:
        catalog.create_tenant("initech", TenantLimits())
    assert caught.value.code == "superseded", "the controller that ran meanwhile is fenced out"
    catalog.close()
    again = open_catalog(database_url, tmp_path)
    assert [tenant.name for tenant in again.view().tenants] == ["acme"]
    again.close()


def test_tables_of_others_are_left_alone(database_url: str, tmp_path: Path) -> None:
    config, file = DatabaseConfig(url=database_url), tmp_path / "state.zip"
    open_catalog(database_url, tmp_path).close()
    engine = make_engine(parsed(config, Path()), config)
    with writing(engine).begin() as connection:
        connection.execute(text("CREATE TABLE theirs (number INTEGER PRIMARY KEY)"))
        connection.execute(text("INSERT INTO theirs VALUES (1)"))
    assert "theirs" not in back_up(config, directory=Path(), file=file).num_rows
    restore(config, directory=Path(), file=file, replace=True)
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT number FROM theirs")) == 1
    engine.dispose()


def test_a_backup_of_an_older_program(new_database: Callable[[], str], tmp_path: Path) -> None:
    old = tmp_path / "old.db"
    with sqlite3.connect(old) as connection:
        connection.executescript((OLD / "version_1.sql").read_text())
    file = tmp_path / "state.zip"
    assert back_up(DatabaseConfig(url=f"sqlite:///{old}"), directory=Path(), file=file).revision == "0001"
    url = new_database()
    restore(DatabaseConfig(url=url), directory=Path(), file=file)
    catalog = open_catalog(url, tmp_path)
    assert [(one.ref.name, one.ref.version) for one in catalog.view().adapters] == [("sql", 1), ("sql", 2)]
    catalog.close()


def _rewritten(file: Path, name: str, change: Callable[[bytes], bytes]) -> Path:
    """A copy of the archive with one member changed."""
    copy = file.with_name(f"changed-{name.replace('/', '-')}")
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(copy, "w") as new:
        for member in old.namelist():
            content = old.read(member)
            new.writestr(member, change(content) if member == name else content)
    return copy


def _with(**changes: object) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps(json.loads(content) | changes).encode()


def test_bad_files_change_nothing(database_url: str, tmp_path: Path) -> None:
    catalog = open_catalog(f"sqlite:///{tmp_path}/source.db", tmp_path)
    _fill(catalog)
    catalog.close()
    good = tmp_path / "state.zip"
    back_up(DatabaseConfig(url=f"sqlite:///{tmp_path}/source.db"), directory=Path(), file=good)
    whole = good.read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    at = whole.index(b"tables/tenants.jsonl") + 60
    (tmp_path / "flipped").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    (tmp_path / "text").write_text("no archive")
    cases: list[tuple[Path, type[LoraplexError], str]] = [
        (tmp_path / "nowhere", NotFound, "there is no file"),
        (tmp_path, InvalidInput, "cannot read"),
        (tmp_path / "cut", InvalidInput, "no backup of the control state"),
        (tmp_path / "flipped", InvalidInput, "damaged"),
        (tmp_path / "text", InvalidInput, "no backup"),
        (_rewritten(good, "state.json", _with(format="x")), InvalidInput, "no backup"),
    ]
    for file, kind, message in cases:
        with pytest.raises(kind, match=message):
            restore(DatabaseConfig(url=database_url), directory=Path(), file=file)
    newer = _rewritten(good, "state.json", _with(revision="9999"))
    with pytest.raises(BadConfig, match=f"has schema 9999, newer than {newest_revision()}"):
        restore(DatabaseConfig(url=database_url), directory=Path(), file=newer)
    later = _rewritten(good, "state.json", _with(format_version=2))
    with pytest.raises(BadConfig, match="has format 2"):
        restore(DatabaseConfig(url=database_url), directory=Path(), file=later)
    fewer = _rewritten(good, "tables/keys.jsonl", lambda content: b"")
    with pytest.raises(InvalidInput, match="0 rows of keys in the place of 1"):
        restore(DatabaseConfig(url=database_url), directory=Path(), file=fewer)
    # Nothing of all this is there: the good one finds the database empty.
    restore(DatabaseConfig(url=database_url), directory=Path(), file=good)


def test_what_cannot_be_backed_up(database_url: str, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="there is no control"):
        back_up(DatabaseConfig(url=database_url), directory=Path(), file=tmp_path / "x")
    assert not (tmp_path / "deep").exists(), "a database that is only looked for is not made"
    open_catalog(database_url, tmp_path).close()
    with pytest.raises(LoraplexError, match="cannot write"):
        back_up(DatabaseConfig(url=database_url), directory=Path(), file=tmp_path / "nowhere" / "x")
    assert os.listdir(tmp_path) in (["deep"], [])


def test_commands(database_url: str, new_database: Callable[[], str], tmp_path: Path) -> None:
    catalog = open_catalog(database_url, tmp_path)
    _fill(catalog)
    catalog.close()
    config = tmp_path / "platform.yaml"
    config.write_text(
        f"base_models: [{{id: tiny, model: demo}}]\ncontroller: {{database: {{url: {json.dumps(database_url)}}}}}\n"
    )
    target = new_database()
    (tmp_path / "url").write_text(target)
    file = str(tmp_path / "state.zip")
    run = CliRunner().invoke
    made = run(app, ["state", "backup", file, "--config", str(config)])
    assert made.exit_code == 0, made.output
    assert "tenants" in made.stdout
    again = run(app, ["state", "restore", file, "--database-file", str(tmp_path / "url")])
    assert again.exit_code == 0, again.output
    assert "pass%2Fword" not in again.output + made.output
    assert _rows(target) == _rows(database_url)
    assert isinstance(run(app, ["state", "backup", file]).exception, SystemExit)
    unclear = run(app, ["state", "backup", file, "--database", target, "--config", str(config)])
    assert unclear.exit_code == 2
    assert "one of --config, --database" in unclear.output
