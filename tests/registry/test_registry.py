"""Versions, aliases, limits and release of artifacts; and a state machine against a dictionary."""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from loraplex.core.adapter import AdapterBlock, AdapterManifest
from loraplex.core.clock import SystemClock
from loraplex.core.control import AdapterView
from loraplex.core.errors import Conflict, NotFound, RateLimited
from loraplex.core.ids import BaseModelId, Digest, TenantName
from loraplex.core.tenant import TenantLimits
from loraplex.database.config import DatabaseConfig
from loraplex.database.database import Database
from loraplex.registry.intake import CheckedAdapter
from loraplex.registry.registry import Registry
from loraplex.tenancy.accounts import Accounts
from sqlalchemy.orm import Session

ACME, GLOBEX = TenantName("acme"), TenantName("globex")
FREE = TenantLimits()


class FakeClock(SystemClock):
    def __init__(self) -> None:
        self.now_s = 1000.0

    def wall_s(self) -> float:
        return self.now_s


def _checked(letter: str, num_bytes: int = 100) -> CheckedAdapter:
    blocks = (
        AdapterBlock(layer=0, module="q_proj", lora_rank=4, scale=0.1),
        AdapterBlock(layer=1, module="v_proj", lora_rank=8, scale=2.0),
    )
    manifest = AdapterManifest(
        digest=Digest(letter * 64), base_model_id=BaseModelId("tiny"), blocks=blocks, num_bytes=num_bytes
    )
    return CheckedAdapter(manifest=manifest, content_sha256=letter * 64)


def _open(url: str) -> Database:
    database = Database(DatabaseConfig(url=url), directory=Path())
    with database.write() as session:
        for name in (ACME, GLOBEX):
            Accounts(SystemClock()).create_tenant(session, name, FREE)
    return database


@pytest.fixture
def session(database_url: str) -> Iterator[Session]:
    database = _open(database_url)
    with database.write() as session:
        yield session
    database.close()


@pytest.fixture
def registry() -> Registry:
    return Registry(FakeClock())


def _versions(views: tuple[AdapterView, ...]) -> list[tuple[str, int, str, bool]]:
    return [(view.ref.name, view.ref.version, view.ref.digest[0], view.current) for view in views]


def test_versions_grow_and_the_newest_is_current(session: Session, registry: Registry) -> None:
    first = registry.publish(session, ACME, "pirate", _checked("a"), FREE)
    second = registry.publish(session, ACME, "pirate", _checked("b"), FREE)
    assert (first.ref.version, second.ref.version) == (1, 2)
    assert second == registry.current(session, ACME, "pirate")
    assert (second.max_lora_rank, second.num_bytes, second.base_model_id) == (8, 100, "tiny")
    assert second.created_s == 1000.0
    assert _versions(registry.views(session, ACME)) == [("pirate", 1, "a", False), ("pirate", 2, "b", True)]
    assert registry.views(session, GLOBEX) == ()


def test_the_same_content_again_is_the_same_version(session: Session, registry: Registry) -> None:
    registry.publish(session, ACME, "pirate", _checked("a"), FREE)
    registry.publish(session, ACME, "pirate", _checked("b"), FREE)
    again = registry.publish(session, ACME, "pirate", _checked("a"), FREE)
    assert (again.ref.version, again.current) == (1, True)
    registry.publish(session, ACME, "copy", _checked("a"), FREE)
    assert len(registry.views(session)) == 3
    assert registry.digests(session) == {"a" * 64, "b" * 64}


def test_rollback_moves_the_alias_alone(session: Session, registry: Registry) -> None:
    for letter in "ab":
        registry.publish(session, ACME, "pirate", _checked(letter), FREE)
    before = registry.views(session)
    view = registry.set_current(session, ACME, "pirate", 1)
    assert view == replace(before[0], current=True)
    assert _versions(registry.views(session)) == [("pirate", 1, "a", True), ("pirate", 2, "b", False)]
    for tenant, name, version in ((ACME, "pirate", 3), (ACME, "nobody", 1), (GLOBEX, "pirate", 1)):
        with pytest.raises(NotFound):
            registry.set_current(session, tenant, name, version)


def test_delete_one_or_all(session: Session, registry: Registry) -> None:
    for letter in "abc":
        registry.publish(session, ACME, "pirate", _checked(letter), FREE)
    with pytest.raises(Conflict, match="roll back"):
        registry.delete(session, ACME, "pirate", 3)
    with pytest.raises(NotFound):
        registry.delete(session, ACME, "pirate", 9)
    with pytest.raises(NotFound):
        registry.delete(session, GLOBEX, "pirate", None)
    registry.delete(session, ACME, "pirate", 1)
    assert [version for _, version, *_ in _versions(registry.views(session))] == [2, 3]
    registry.delete(session, ACME, "pirate", None)
    assert registry.views(session) == ()
    assert registry.current(session, ACME, "pirate") is None
    with pytest.raises(NotFound):
        registry.delete(session, ACME, "pirate", None)
    assert registry.publish(session, ACME, "pirate", _checked("d"), FREE).ref.version == 4, "numbers are not reused"


def test_the_last_version_may_be_deleted_by_number(session: Session, registry: Registry) -> None:
    registry.publish(session, ACME, "pirate", _checked("a"), FREE)
    registry.delete(session, ACME, "pirate", 1)
    assert registry.current(session, ACME, "pirate") is None


def test_artifacts_stay_until_nothing_names_them_for_long_enough(session: Session) -> None:
    clock = FakeClock()
    registry = Registry(clock)
    for name in ("one", "two"):
        registry.publish(session, ACME, name, _checked("a"), FREE)
    registry.delete(session, ACME, "one", None)
    assert registry.forget(session, released_before_s=1e9) == (), "still named"
    registry.delete(session, ACME, "two", None)
    assert registry.artifact(session, _checked("a").manifest.digest).manifest == _checked("a").manifest
    assert registry.forget(session, released_before_s=1000.0) == ()
    registry.publish(session, ACME, "three", _checked("a"), FREE)
    assert registry.forget(session, released_before_s=1e9) == (), "named again"
    registry.delete(session, ACME, "three", None)
    assert registry.forget(session, released_before_s=1000.1) == ("a" * 64,)
    with pytest.raises(NotFound):
        registry.artifact(session, Digest("a" * 64))


def test_limits(session: Session, registry: Registry) -> None:
    limits = TenantLimits(max_adapters=1, max_adapter_bytes=250)
    registry.publish(session, ACME, "pirate", _checked("a"), limits)
    registry.publish(session, ACME, "pirate", _checked("b"), limits)
    with pytest.raises(RateLimited, match="limit of 1 adapters"):
        registry.publish(session, ACME, "other", _checked("c"), limits)
    with pytest.raises(RateLimited, match="hold 200 bytes; 100 more exceed its limit of 250"):
        registry.publish(session, ACME, "pirate", _checked("c"), limits)
    registry.publish(session, ACME, "pirate", _checked("a"), limits)
    registry.publish(session, GLOBEX, "other", _checked("d", 250), limits)
    session.rollback()


def test_a_deleted_tenant_releases_its_artifacts(session: Session, registry: Registry) -> None:
    registry.publish(session, ACME, "pirate", _checked("a"), FREE)
    registry.publish(session, GLOBEX, "pirate", _checked("b"), FREE)
    registry.delete_tenant(session, ACME)
    Accounts(SystemClock()).delete_tenant(session, ACME)
    assert _versions(registry.views(session)) == [("pirate", 1, "b", True)]
    assert registry.forget(session, released_before_s=1e9) == ("a" * 64,)
    Accounts(SystemClock()).create_tenant(session, ACME, FREE)
    assert registry.publish(session, ACME, "pirate", _checked("c"), FREE).ref.version == 1


class RegistryMachine(RuleBasedStateMachine):
    """Two tenants, two names, four contents, against ``{(tenant, name): (current, {version: letter})}``."""

    TENANTS = st.sampled_from([ACME, GLOBEX])
    NAMES = st.sampled_from(["one", "two"])
    VERSIONS = st.integers(1, 5)

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.database = _open(f"sqlite:///{self.directory.name}/control.db")
        self.registry = Registry(FakeClock())
        self.model: dict[tuple[TenantName, str], dict[int, str]] = {}
        self.current: dict[tuple[TenantName, str], int] = {}
        self.last: dict[tuple[TenantName, str], int] = {}

    def teardown(self) -> None:
        self.database.close()
        self.directory.cleanup()

    @rule(tenant=TENANTS, name=NAMES, letter=st.sampled_from("abcd"))
    def publish(self, tenant: TenantName, name: str, letter: str) -> None:
        # As the salted digest does: never the same one for two tenants.
        letter = letter if tenant == ACME else {"a": "5", "b": "6", "c": "7", "d": "8"}[letter]
        key = (tenant, name)
        versions = self.model.setdefault(key, {})
        known = [version for version, content in versions.items() if content == letter]
        expected = known[0] if known else self.last.get(key, 0) + 1
        with self.database.write() as session:
            assert self.registry.publish(session, tenant, name, _checked(letter), FREE).ref.version == expected
        versions[expected] = letter
        self.current[key] = expected
        self.last[key] = max(self.last.get(key, 0), expected)

    @rule(tenant=TENANTS, name=NAMES, version=VERSIONS)
    def set_current(self, tenant: TenantName, name: str, version: int) -> None:
        try:
            with self.database.write() as session:
                self.registry.set_current(session, tenant, name, version)
        except NotFound:
            self.outcome = version not in self.model.get((tenant, name), {})
        else:
            self.outcome = version in self.model[tenant, name]
            self.current[tenant, name] = version

    @rule(tenant=TENANTS, name=NAMES, version=VERSIONS | st.none())
    def delete(self, tenant: TenantName, name: str, version: int | None) -> None:
        key = (tenant, name)
        versions = self.model.get(key, {})
        try:
            with self.database.write() as session:
                self.registry.delete(session, tenant, name, version)
        except NotFound:
            self.outcome = not versions or (version is not None and version not in versions)
        except Conflict:
            self.outcome = version == self.current[key] and len(versions) > 1
        else:
            self.outcome = bool(versions)
            for number in list(versions) if version is None else [version]:
                del versions[number]
                if self.current.get(key) == number:
                    del self.current[key]

    outcome = True

    @invariant()
    def agrees(self) -> None:
        assert self.outcome
        with self.database.read() as session:
            views = self.registry.views(session)
            kept = self.registry.digests(session)
        expected = {
            (tenant, name, version, letter * 64, self.current.get((tenant, name)) == version)
            for (tenant, name), versions in self.model.items()
            for version, letter in versions.items()
        }
        got = [(view.ref.tenant, view.ref.name, view.ref.version, view.ref.digest, view.current) for view in views]
        assert set(got) == expected
        assert len(got) == len(expected)
        assert {view.ref.digest for view in views} <= kept


TestRegistryMachine = RegistryMachine.TestCase
TestRegistryMachine.settings = settings(max_examples=20, stateful_step_count=25, deadline=None)
