"""Tenants, keys and usage in the database."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from loraplex.core.clock import SystemClock
from loraplex.core.errors import Conflict, InvalidInput, NotFound
from loraplex.core.ids import TenantName
from loraplex.core.tenant import Role, TenantLimits, UsageRow
from loraplex.database.config import DatabaseConfig
from loraplex.database.database import Database
from loraplex.tenancy.accounts import Accounts
from loraplex.tenancy.keys import hash_key, new_key

ACME = TenantName("acme")
GLOBEX = TenantName("globex")


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(DatabaseConfig(url=database_url), directory=Path())
    yield database
    database.close()


@pytest.fixture
def accounts(database: Database) -> Accounts:
    accounts = Accounts(SystemClock())
    with database.write() as session:
        accounts.create_tenant(session, "acme", TenantLimits(requests_per_minute=5))
        accounts.create_tenant(session, "globex", TenantLimits())
    return accounts


def test_limits_are_kept_and_replaced(database: Database, accounts: Accounts) -> None:
    with database.read() as session:
        assert accounts.tenant(session, ACME).limits == TenantLimits(requests_per_minute=5)
    with database.write() as session:
        accounts.update_tenant(session, ACME, TenantLimits(max_adapters=2))
    with database.read() as session:
        assert accounts.tenant(session, ACME).limits == TenantLimits(max_adapters=2)


def test_salts_differ_between_tenants_and_lives(database: Database, accounts: Accounts) -> None:
    with database.write() as session:
        salts = {accounts.digest_salt(session, name) for name in (ACME, GLOBEX)}
        salts |= {view.cache_salt for view in accounts.tenants(session)}
        accounts.delete_tenant(session, ACME)
        accounts.create_tenant(session, "acme", TenantLimits())
        salts.add(accounts.digest_salt(session, ACME))
    assert len(salts) == 5


@pytest.mark.parametrize("name", ["", "A", "-a", "a b", "../a", "a" * 64, "a\n", "ä"])
def test_bad_names_are_refused(database: Database, accounts: Accounts, name: str) -> None:
    with pytest.raises(InvalidInput) as caught, database.write() as session:
        accounts.create_tenant(session, name, TenantLimits())
    assert caught.value.param == "name"


def test_names_are_unique_and_limits_are_checked(database: Database, accounts: Accounts) -> None:
    with pytest.raises(Conflict), database.write() as session:
        accounts.create_tenant(session, "acme", TenantLimits())
    with pytest.raises(InvalidInput, match="tokens_per_minute"), database.write() as session:
        accounts.update_tenant(session, ACME, TenantLimits(tokens_per_minute=-1))
    for weight in (0, -1, 10**9):
        with database.write() as session, pytest.raises(InvalidInput, match="weight"):
            accounts.update_tenant(session, ACME, TenantLimits(weight=weight))
    with database.write() as session:
        accounts.update_tenant(session, ACME, TenantLimits(weight=4))
    with database.read() as session:
        assert accounts.tenant(session, ACME).limits == TenantLimits(weight=4)


@pytest.mark.parametrize("new_database", ["sqlite"], indirect=True)
def test_only_the_hash_of_a_key_is_stored(database: Database, accounts: Accounts, database_url: str) -> None:
    key = new_key()
    assert key.startswith("lpx_")
    assert len(key) == 4 + 43
    with database.write() as session:
        view = accounts.add_key(session, ACME, Role.MEMBER, key)
    assert view.key_sha256 == hash_key(key)
    with database.read() as session:
        assert accounts.keys(session, ACME) == (view,)
        assert accounts.keys(session, GLOBEX) == ()
    database.close()
    stored = b"".join(path.read_bytes() for path in Path(database_url.removeprefix("sqlite:///")).parent.iterdir())
    assert key.encode() not in stored
    assert view.key_sha256.encode() in stored


def test_ensure_key_is_idempotent_and_never_moves_a_key(database: Database, accounts: Accounts) -> None:
    key = new_key()
    with database.write() as session:
        first = accounts.ensure_key(session, ACME, Role.MEMBER, key)
        assert accounts.ensure_key(session, ACME, Role.MEMBER, key) == first
    for tenant, role in ((GLOBEX, Role.MEMBER), (ACME, Role.ADMIN)):
        with pytest.raises(Conflict), database.write() as session:
            accounts.ensure_key(session, tenant, role, key)
    with pytest.raises(InvalidInput), database.write() as session:
        accounts.ensure_key(session, ACME, Role.MEMBER, "lpx_short")


def test_a_key_is_deleted_by_its_own_tenant_only(database: Database, accounts: Accounts) -> None:
    with database.write() as session:
        view = accounts.add_key(session, ACME, Role.MEMBER, new_key())
    with pytest.raises(NotFound), database.write() as session:
        accounts.delete_key(session, GLOBEX, view.key_id)
    with database.write() as session:
        accounts.delete_key(session, ACME, view.key_id)
        assert accounts.keys(session) == ()


def test_usage_adds_up_and_goes_with_the_tenant(database: Database, accounts: Accounts) -> None:
    row = UsageRow(tenant=ACME, requests=1, prompt_tokens=10, output_tokens=5)
    gone = UsageRow(tenant=TenantName("nobody"), requests=1, prompt_tokens=1, output_tokens=1)
    with database.write() as session:
        accounts.add_usage(session, (row, gone, row))
    with database.read() as session:
        assert accounts.usage(session, ACME) == UsageRow(tenant=ACME, requests=2, prompt_tokens=20, output_tokens=10)
    with database.write() as session:
        accounts.add_key(session, ACME, Role.MEMBER, new_key())
        accounts.delete_tenant(session, ACME)
        assert accounts.keys(session) == ()
        for call in (accounts.usage, accounts.tenant, accounts.delete_tenant):
            with pytest.raises(NotFound):
                call(session, ACME)
