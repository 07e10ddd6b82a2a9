"""Decides in a gateway whether a tenant's request may go on, counts what it used and what was asked for.

Owns reservations, token buckets, running counts, demand counters and unreported usage. Knows no clock, no controller
and no other gateway: limits, shares and time come in. Called by the gateway's service (reserve, settle) and by its
lease loop (update_limits, update_shares, take_demand, take_usage). Not thread-safe.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from loraplex.core.control import QuotaShare, TenantDemand
from loraplex.core.errors import NotFound, RateLimited
from loraplex.core.ids import TenantName
from loraplex.core.tenant import TenantLimits, TenantView, UsageRow
from loraplex.tenancy.bucket import SECONDS_PER_MINUTE, TokenBucket
from loraplex.tenancy.config import TenancyConfig
from loraplex.tenancy.share_book import OTHER_TENANTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """Handed back to ``settle``, exactly once, whatever becomes of the request."""

    number: int
    tenant: TenantName
    tokens: int


class _Account:
    """One tenant at this gateway."""

    __slots__ = (
        "limits",
        "offered_requests",
        "offered_tokens",
        "request_bucket",
        "running",
        "token_bucket",
        "used_output_tokens",
        "used_prompt_tokens",
        "used_requests",
    )

    def __init__(self, limits: TenantLimits) -> None:
        self.limits = limits
        self.request_bucket: TokenBucket | None = None
        self.token_bucket: TokenBucket | None = None
        self.running = 0
        self.offered_requests = 0
        self.offered_tokens = 0
        self.used_requests = 0
        self.used_prompt_tokens = 0
        self.used_output_tokens = 0

    def set_limits(self, limits: TenantLimits, share: float, now_s: float) -> None:
        self.limits = limits
        self.request_bucket = _resized(self.request_bucket, limits.requests_per_minute, share, now_s)
        self.token_bucket = _resized(self.token_bucket, limits.tokens_per_minute, share, now_s)


class QuotaGate:
    """A tenant without limits is always admitted; one with limits within this gateway's share of them."""

    def __init__(self, config: TenancyConfig) -> None:
        self._config = config
        self._accounts: dict[TenantName, _Account] = {}
        self._shares: dict[TenantName, float] = {}
        self._held: tuple[QuotaShare, ...] = ()
        self._other_share = 0.0
        self._open: dict[int, _Account] = {}
        """By reservation number. An account outlives its tenant here, so that a tenant that was deleted and made again
        is not charged for its predecessor."""
        self._next_number = 0

    def update_limits(self, tenants: Iterable[TenantView], now_s: float) -> None:
        """The tenants of a new snapshot; ones that are missing in it are gone."""
        present = set()
        for view in tenants:
            present.add(view.name)
            account = self._accounts.get(view.name)
            if account is None:
                account = self._accounts[view.name] = _Account(view.limits)
                account.set_limits(view.limits, self._share(view.name), now_s)
            elif account.limits != view.limits:
                account.set_limits(view.limits, self._share(view.name), now_s)
        for name in self._accounts.keys() - present:
            del self._accounts[name]

    def update_shares(self, shares: Iterable[QuotaShare], now_s: float) -> None:
        """The whole answer of ``lease_quota``; it replaces the last one. Without an answer the last one goes on."""
        self._held = tuple(shares)
        by_tenant = {row.tenant: row.share for row in self._held}
        self._other_share = by_tenant.pop(OTHER_TENANTS, 0.0)
        self._shares = by_tenant
        for name, account in self._accounts.items():
            account.set_limits(account.limits, self._share(name), now_s)

    @property
    def held(self) -> tuple[QuotaShare, ...]:
        """The last answer of ``lease_quota``; empty before the first."""
        return self._held

    def reserve(self, tenant: TenantName, tokens: int, now_s: float) -> Reservation:
        """Takes one request, ``tokens`` (prompt + most output) and one running place, or nothing at all.

        Raises RateLimited naming the limit, with the time after which a retry may succeed; NotFound for a tenant that
        no snapshot named.
        """
        account = self._accounts.get(tenant)
        if account is None:
            raise NotFound(f"no tenant {tenant!r}", param="tenant")
        account.offered_requests += 1
        account.offered_tokens += tokens
        self._check_concurrency(tenant, account)
        self._check_bucket(account.request_bucket, 1, account.limits.requests_per_minute, "requests", now_s)
        self._check_bucket(account.token_bucket, tokens, account.limits.tokens_per_minute, "tokens", now_s)
        if account.request_bucket is not None:
            account.request_bucket.take(1)
        if account.token_bucket is not None:
            account.token_bucket.take(tokens)
        account.running += 1
        reservation = Reservation(number=self._next_number, tenant=tenant, tokens=tokens)
        self._next_number += 1
        self._open[reservation.number] = account
        return reservation

    def settle(self, reservation: Reservation, actual_tokens: int, now_s: float, *, prompt_tokens: int = 0) -> None:
        """The request ended: frees its place, refunds what it did not use (or charges what it used beyond)
        and counts it.

        ``actual_tokens`` = prompt + output tokens, of which ``prompt_tokens`` are the prompt's. A second call with
        the same reservation does nothing, so that an error path may settle without knowing what ran before it.
        """
        account = self._open.pop(reservation.number, None)
        if account is None:
            return
        account.running -= 1
        if account.token_bucket is not None:
            account.token_bucket.advance(now_s)
            unused = reservation.tokens - actual_tokens
            if unused >= 0:
                account.token_bucket.give_back(unused)
            else:
                account.token_bucket.take(-unused)
        account.used_requests += 1
        account.used_prompt_tokens += prompt_tokens
        account.used_output_tokens += max(0, actual_tokens - prompt_tokens)

    def take_demand(self) -> tuple[TenantDemand, ...]:
        """What tenants asked for since the last call, admitted or not. Tenants that asked for nothing are left out."""
        rows = []
        for name, account in self._accounts.items():
            if account.offered_requests or account.running:
                rows.append(
                    TenantDemand(
                        tenant=name,
                        requests=account.offered_requests,
                        tokens=account.offered_tokens,
                        running=account.running,
                    )
                )
                account.offered_requests = account.offered_tokens = 0
        return tuple(rows)

    def take_usage(self) -> tuple[UsageRow, ...]:
        """What was used since the last call; the caller reports it, or hands it to ``return_usage``."""
        rows = (_taken_usage(name, account) for name, account in self._accounts.items())
        return tuple(row for row in rows if row is not None)

    def return_usage(self, rows: Iterable[UsageRow]) -> None:
        """Rows that could not be reported; the next ``take_usage`` holds them again."""
        for row in rows:
            account = self._accounts.get(row.tenant)
            if account is None:
                continue
            account.used_requests += row.requests
            account.used_prompt_tokens += row.prompt_tokens
            account.used_output_tokens += row.output_tokens

    def validate(self) -> None:
        holders = [id(account) for account in self._open.values()]
        for account in self._accounts.values():
            assert account.running == holders.count(id(account))
            for bucket in (account.request_bucket, account.token_bucket):
                if bucket is not None:
                    bucket.validate()

    def _share(self, tenant: TenantName) -> float:
        return self._shares.get(tenant, self._other_share)

    def _check_concurrency(self, tenant: TenantName, account: _Account) -> None:
        limit = account.limits.max_concurrent_requests
        if limit is None:
            return
        # Shares of small limits come in whole places (see share_book); the addend undoes their rounding.
        if account.running >= math.floor(limit * self._share(tenant) + 1e-6):
            raise RateLimited(
                f"the tenant's limit of {limit} concurrent requests is reached",
                retry_after_s=self._config.slice_s,
                code="concurrency_limit_exceeded",
            )

    def _check_bucket(
        self, bucket: TokenBucket | None, amount: int, limit: int | None, unit: str, now_s: float
    ) -> None:
        if bucket is None or limit is None:
            return
        if amount > limit:
            raise RateLimited(
                f"the request needs {amount} {unit}, more than the tenant's limit of {limit} {unit} per minute",
                retry_after_s=SECONDS_PER_MINUTE,
            )
        wait_s = bucket.wait_s(amount, now_s)
        if wait_s > 0:
            raise RateLimited(
                f"the tenant's limit of {limit} {unit} per minute is reached",
                retry_after_s=self._config.slice_s if math.isinf(wait_s) else wait_s,
            )


def _resized(bucket: TokenBucket | None, limit: int | None, share: float, now_s: float) -> TokenBucket | None:
    if limit is None:
        return None
    if bucket is None:
        return TokenBucket(limit, share, now_s)
    bucket.resize(limit, share, now_s)
    return bucket


def _taken_usage(name: TenantName, account: _Account) -> UsageRow | None:
    if not account.used_requests:
        return None
    row = UsageRow(
        tenant=name,
        requests=account.used_requests,
        prompt_tokens=account.used_prompt_tokens,
        output_tokens=account.used_output_tokens,
    )
    account.used_requests = account.used_prompt_tokens = account.used_output_tokens = 0
    return row
