"""The quota gate: each limit, refunds, shares, counters; and a state machine against an independent model."""

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from loraplex.core.control import QuotaShare
from loraplex.core.errors import NotFound, RateLimited
from loraplex.core.ids import TenantName
from loraplex.core.tenant import TenantLimits, TenantView, UsageRow
from loraplex.tenancy import QuotaGate, Reservation, TenancyConfig
from loraplex.tenancy.share_book import OTHER_TENANTS

ACME = TenantName("acme")


def _view(limits: TenantLimits, name: TenantName = ACME) -> TenantView:
    return TenantView(name=name, cache_salt="salt", limits=limits)


def _gate(limits: TenantLimits, share: float = 1.0) -> QuotaGate:
    gate = QuotaGate(TenancyConfig())
    gate.update_limits([_view(limits)], 0.0)
    gate.update_shares([QuotaShare(tenant=OTHER_TENANTS, share=share)], 0.0)
    return gate


def test_requests_per_minute() -> None:
    gate = _gate(TenantLimits(requests_per_minute=3))
    for _ in range(3):
        gate.reserve(ACME, 10, 0.0)
    with pytest.raises(RateLimited, match="3 requests per minute") as caught:
        gate.reserve(ACME, 10, 0.0)
    assert caught.value.retry_after_s == pytest.approx(20)
    with pytest.raises(RateLimited):
        gate.reserve(ACME, 10, 19.9)
    gate.reserve(ACME, 10, 20.0)


def test_tokens_per_minute_with_refund_and_surcharge() -> None:
    gate = _gate(TenantLimits(tokens_per_minute=600))
    first = gate.reserve(ACME, 500, 0.0)
    with pytest.raises(RateLimited) as caught:
        gate.reserve(ACME, 200, 0.0)
    assert caught.value.retry_after_s == pytest.approx(10)
    gate.settle(first, 100, 0.0)
    second = gate.reserve(ACME, 500, 0.0)
    gate.settle(second, 620, 0.0)
    with pytest.raises(RateLimited) as caught:
        gate.reserve(ACME, 1, 0.0)
    assert caught.value.retry_after_s == pytest.approx(12.1)


def test_more_than_the_whole_limit_is_refused_by_name() -> None:
    gate = _gate(TenantLimits(tokens_per_minute=600))
    with pytest.raises(RateLimited, match="needs 601 tokens, more than the tenant's limit of 600"):
        gate.reserve(ACME, 601, 0.0)


def test_a_large_request_passes_a_small_share_in_debt() -> None:
    gate = _gate(TenantLimits(tokens_per_minute=600), share=0.5)
    gate.reserve(ACME, 500, 0.0)
    with pytest.raises(RateLimited) as caught:
        gate.reserve(ACME, 1, 0.0)
    assert caught.value.retry_after_s == pytest.approx(201 / 300 * 60)


def test_concurrent_requests() -> None:
    gate = _gate(TenantLimits(max_concurrent_requests=2))
    first = gate.reserve(ACME, 1, 0.0)
    gate.reserve(ACME, 1, 0.0)
    with pytest.raises(RateLimited, match="2 concurrent"):
        gate.reserve(ACME, 1, 0.0)
    gate.settle(first, 1, 0.0)
    gate.settle(first, 1, 0.0)
    gate.reserve(ACME, 1, 0.0)
    with pytest.raises(RateLimited):
        gate.reserve(ACME, 1, 0.0)


def test_a_refusal_takes_nothing() -> None:
    gate = _gate(TenantLimits(requests_per_minute=1, tokens_per_minute=100, max_concurrent_requests=1))
    for _ in range(5):
        with pytest.raises(RateLimited, match="needs 101 tokens"):
            gate.reserve(ACME, 101, 0.0)
    gate.reserve(ACME, 100, 0.0)


def test_without_limits_everything_passes_also_without_a_share() -> None:
    gate = QuotaGate(TenancyConfig())
    gate.update_limits([_view(TenantLimits())], 0.0)
    for _ in range(100):
        gate.reserve(ACME, 10**9, 0.0)


def test_without_a_share_a_limited_tenant_waits_one_slice() -> None:
    gate = QuotaGate(TenancyConfig(slice_s=0.5))
    gate.update_limits([_view(TenantLimits(requests_per_minute=10))], 0.0)
    with pytest.raises(RateLimited) as caught:
        gate.reserve(ACME, 1, 0.0)
    assert caught.value.retry_after_s == 0.5
    gate.update_shares([QuotaShare(tenant=OTHER_TENANTS, share=1.0)], 0.5)
    gate.reserve(ACME, 1, 0.5)


def test_moving_a_share_away_and_back_creates_nothing() -> None:
    gate = _gate(TenantLimits(requests_per_minute=10))
    for share in (0.1, 1.0):
        gate.update_shares([QuotaShare(tenant=ACME, share=share)], 0.0)
    gate.reserve(ACME, 1, 0.0)
    with pytest.raises(RateLimited):
        gate.reserve(ACME, 1, 0.0)


def test_unknown_and_deleted_tenants() -> None:
    gate = _gate(TenantLimits(max_concurrent_requests=1))
    with pytest.raises(NotFound):
        gate.reserve(TenantName("nobody"), 1, 0.0)
    old = gate.reserve(ACME, 1, 0.0)
    gate.update_limits([], 0.0)
    gate.update_limits([_view(TenantLimits(max_concurrent_requests=1))], 0.0)
    gate.reserve(ACME, 1, 0.0)
    gate.settle(old, 1, 0.0)
    gate.validate()
    with pytest.raises(RateLimited):
        gate.reserve(ACME, 1, 0.0)


def test_demand_counts_refused_requests_too_and_usage_survives_a_failed_report() -> None:
    gate = _gate(TenantLimits(requests_per_minute=1))
    reservation = gate.reserve(ACME, 30, 0.0)
    with pytest.raises(RateLimited):
        gate.reserve(ACME, 40, 0.0)
    (demand,) = gate.take_demand()
    assert (demand.requests, demand.tokens, demand.running) == (2, 70, 1)
    gate.settle(reservation, 25, 0.0, prompt_tokens=20)
    assert gate.take_demand() == ()
    expected = (UsageRow(tenant=ACME, requests=1, prompt_tokens=20, output_tokens=5),)
    rows = gate.take_usage()
    assert rows == expected
    assert gate.take_usage() == ()
    gate.return_usage(rows)
    assert gate.take_usage() == expected


class GateMachine(RuleBasedStateMachine):
    """Admissions of one tenant against what its limits allow in any window."""

    LIMITS = TenantLimits(requests_per_minute=12, tokens_per_minute=600, max_concurrent_requests=5)

    def __init__(self) -> None:
        super().__init__()
        self.gate = _gate(self.LIMITS)
        self.now_s = 0.0
        self.admitted: list[tuple[float, int]] = []
        self.open: list[Reservation] = []
        self.used = 0
        self.settled = 0
        self.retry_after_s = 1.0

    @rule(seconds=st.floats(0, 40))
    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(tokens=st.integers(1, 700))
    def reserve(self, tokens: int) -> None:
        try:
            self.open.append(self.gate.reserve(ACME, tokens, self.now_s))
        except RateLimited as error:
            self.retry_after_s = error.retry_after_s
            return
        self.admitted.append((self.now_s, tokens))

    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        if self.open:
            reservation = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
            actual = data.draw(st.integers(0, reservation.tokens))
            self.gate.settle(reservation, actual, self.now_s)
            self.admitted.append((self.now_s, actual - reservation.tokens))
            self.used += actual
            self.settled += 1

    @rule(share=st.sampled_from([0.2, 0.4, 0.6, 1.0]))
    def change_share(self, share: float) -> None:
        self.gate.update_shares([QuotaShare(tenant=ACME, share=share)], self.now_s)

    @rule()
    def report(self) -> None:
        rows = self.gate.take_usage()
        assert sum(row.requests for row in rows) == self.settled
        assert sum(row.output_tokens for row in rows) == self.used
        self.settled = self.used = 0

    @invariant()
    def holds(self) -> None:
        self.gate.validate()
        assert len(self.open) <= 5
        assert 0 < self.retry_after_s <= 180
        elapsed_s = self.now_s
        requests = sum(1 for _, tokens in self.admitted if tokens > 0)
        assert requests <= math.floor(12 * (1 + elapsed_s / 60) + 1e-6)
        # Net of refunds; one request larger than a small share may run ahead of it by its own size.
        assert sum(tokens for _, tokens in self.admitted) <= 600 * (1 + elapsed_s / 60) + 600


TestGateMachine = GateMachine.TestCase
TestGateMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
