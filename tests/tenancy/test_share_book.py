"""The share book: conservation at every moment, convergence to demand, silence, whole places, idle tenants."""

import math
import time

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from loraplex.core.control import QuotaShare, TenantDemand
from loraplex.core.ids import GatewayId, TenantName
from loraplex.core.tenant import TenantLimits
from loraplex.tenancy import ShareBook, TenancyConfig
from loraplex.tenancy.share_book import OTHER_TENANTS

ACME = TenantName("acme")
GATEWAYS = tuple(GatewayId(name) for name in ("g1", "g2", "g3"))
RATE = {ACME: TenantLimits(requests_per_minute=60)}


def _demand(requests: int, running: int = 0, tenant: TenantName = ACME) -> tuple[TenantDemand, ...]:
    return (TenantDemand(tenant=tenant, requests=requests, tokens=requests * 100, running=running),)


def _share(rows: object, tenant: TenantName = ACME) -> float:
    shares = {row.tenant: row.share for row in rows}  # type: ignore[attr-defined]
    return float(shares.get(tenant, shares[OTHER_TENANTS]))


def test_a_single_gateway_holds_everything() -> None:
    book = ShareBook(TenancyConfig())
    rows = book.lease(GATEWAYS[0], (), RATE, 0.0)
    assert [(row.tenant, row.share) for row in rows] == [(OTHER_TENANTS, 1.0)]
    assert _share(book.lease(GATEWAYS[0], _demand(5), RATE, 1.0)) == 1.0


@pytest.mark.parametrize("num_gateways", [1, 3])
def test_shares_follow_demand_and_return_to_even(num_gateways: int) -> None:
    book = ShareBook(TenancyConfig())
    gateways = GATEWAYS[:num_gateways]
    held: dict[GatewayId, float] = {}
    for second in range(8):
        for index, gateway in enumerate(gateways):
            held[gateway] = _share(book.lease(gateway, _demand(10) if index == 0 else (), RATE, float(second)))
    even = 1 / num_gateways
    assert held[gateways[0]] == pytest.approx(0.2 * even + 0.8, abs=0.01)
    assert sum(held.values()) == pytest.approx(1, abs=0.01)
    for second in range(8, 30):
        for gateway in gateways:
            rows = book.lease(gateway, (), RATE, float(second))
            held[gateway] = _share(rows)
    assert all(share == pytest.approx(even) for share in held.values())
    assert len(rows) == 1, "an idle tenant is covered by the row of the others again"


def test_a_silent_gateway_loses_its_share() -> None:
    book = ShareBook(TenancyConfig(silent_after_s=5))
    first, second = GATEWAYS[:2]
    assert _share(book.lease(first, (), RATE, 0.0)) == 1.0
    assert _share(book.lease(second, (), RATE, 0.0)) == 0.0
    assert _share(book.lease(first, (), RATE, 1.0)) == 0.5
    assert _share(book.lease(second, (), RATE, 1.0)) == 0.5
    assert _share(book.lease(first, _demand(1), RATE, 5.9)) == 0.5
    assert _share(book.lease(first, _demand(1), RATE, 6.1)) == 1.0


def test_few_places_are_given_whole() -> None:
    limits = {ACME: TenantLimits(max_concurrent_requests=2)}
    book = ShareBook(TenancyConfig())
    for second in range(4):
        held = [_share(book.lease(gateway, (), limits, float(second))) for gateway in GATEWAYS]
    assert sorted(held) == [0, 0.5, 0.5]
    without = GATEWAYS[held.index(0)]
    for second in range(4, 10):
        held = [
            _share(book.lease(gateway, _demand(1) if gateway == without else (), limits, float(second)))
            for gateway in GATEWAYS
        ]
    assert held[GATEWAYS.index(without)] == 1.0, "the gateway that is asked gets the places"


def test_places_of_running_requests_are_not_given_away() -> None:
    limits = {ACME: TenantLimits(max_concurrent_requests=4)}
    book = ShareBook(TenancyConfig())
    first, second = GATEWAYS[:2]
    assert _share(book.lease(first, _demand(4, running=4), limits, 0.0)) == 1.0
    for now_s in range(1, 6):
        assert _share(book.lease(second, _demand(9), limits, float(now_s))) == 0.0
        assert _share(book.lease(first, _demand(0, running=4), limits, float(now_s))) == 1.0
    assert _share(book.lease(first, (), limits, 6.0)) < 1.0
    assert _share(book.lease(second, _demand(9), limits, 6.1)) >= 0.5


def test_a_restarted_book_grants_no_more_than_what_is_free() -> None:
    limits = {ACME: TenantLimits(max_concurrent_requests=4), TenantName("rate"): TenantLimits(requests_per_minute=60)}
    config = TenancyConfig(silent_after_s=5)
    before = ShareBook(config)
    for second in range(4):
        held = {gateway: before.lease(gateway, _demand(2), limits, float(second)) for gateway in GATEWAYS[:2]}
    assert [_share(rows) for rows in held.values()] == [0.5, 0.5]
    first, second, third = GATEWAYS
    book = ShareBook(config)
    rows = book.lease(first, _demand(9, running=2), limits, 100.0, held[first])
    assert (_share(rows), _share(rows, TenantName("rate"))) == (0.5, 0.5)
    assert _share(book.lease(third, _demand(9), limits, 100.1)) == 0.0, "a new gateway takes nothing that is held"
    rows = book.lease(second, _demand(1, running=1), limits, 100.2, held[second])
    assert _share(rows) <= 0.5
    book.validate()

    alone = ShareBook(config)
    for now_s in (100.0, 104.9):
        assert _share(alone.lease(first, _demand(9), limits, now_s, held[first])) == 0.5
    assert _share(alone.lease(first, _demand(9), limits, 105.0, held[first])) == 1.0, "the other one is gone"


def test_ten_thousand_idle_tenants_cost_one_row() -> None:
    limits = {TenantName(f"t{index}"): TenantLimits(requests_per_minute=60) for index in range(10_000)}
    book = ShareBook(TenancyConfig())
    started = time.perf_counter()
    for second in range(5):
        assert len(book.lease(GATEWAYS[0], (), limits, float(second))) == 1
    assert (time.perf_counter() - started) / 5 < 0.1


class ShareMachine(RuleBasedStateMachine):
    """Gateways lease at random times, fall silent, come back; tenants come, go and change limits."""

    TENANTS = tuple(TenantName(name) for name in ("a", "b", "c"))
    CHOICES = (
        TenantLimits(),
        TenantLimits(requests_per_minute=10),
        TenantLimits(max_concurrent_requests=1),
        TenantLimits(max_concurrent_requests=7, tokens_per_minute=1000),
        TenantLimits(max_concurrent_requests=100),
    )

    def __init__(self) -> None:
        super().__init__()
        self.config = TenancyConfig(silent_after_s=5, idle_after_s=3)
        self.book = ShareBook(self.config)
        self.now_s = 0.0
        self.limits: dict[TenantName, TenantLimits] = {}
        self.held: dict[GatewayId, tuple[float, tuple[QuotaShare, ...]]] = {}
        self.restarted = False

    @rule()
    def restart(self) -> None:
        """The controller comes back with an empty book; who was silent before is gone for good."""
        self.held = {g: held for g, held in self.held.items() if self.now_s - held[0] <= self.config.silent_after_s}
        self.book = ShareBook(self.config)
        self.restarted = bool(self.held)

    @rule(seconds=st.floats(0, 3))
    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(tenant=st.sampled_from(TENANTS), limits=st.sampled_from(CHOICES))
    def set_tenant(self, tenant: TenantName, limits: TenantLimits) -> None:
        self.limits[tenant] = limits

    @rule(tenant=st.sampled_from(TENANTS))
    def drop_tenant(self, tenant: TenantName) -> None:
        self.limits.pop(tenant, None)

    @rule(
        gateway=st.sampled_from(GATEWAYS),
        tenants=st.lists(st.sampled_from(TENANTS), unique=True),
        requests=st.integers(0, 50),
        running=st.integers(0, 10),
    )
    def lease(self, gateway: GatewayId, tenants: list[TenantName], requests: int, running: int) -> None:
        demand = tuple(row for name in tenants for row in _demand(requests, running, name))
        if self.restarted and gateway not in self.held:
            return  # the first to lease from a restarted book is one that leased before
        self.restarted = False
        _, held = self.held.get(gateway, (0.0, ()))
        rows = self.book.lease(gateway, demand, self.limits, self.now_s, held)
        self.held[gateway] = (self.now_s, rows)

    @invariant()
    def never_more_than_all(self) -> None:
        self.book.validate()
        live = [rows for seen_s, rows in self.held.values() if self.now_s - seen_s <= self.config.silent_after_s]
        for tenant, limits in self.limits.items():
            shares = [_share(rows, tenant) for rows in live]
            assert sum(shares) <= 1 + 1e-6
            places = limits.max_concurrent_requests
            if places is not None:
                assert sum(math.floor(places * share + 1e-6) for share in shares) <= places


TestShareMachine = ShareMachine.TestCase
TestShareMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
