"""Divides each tenant's limits among the gateways by demand, one lease at a time. Controller side; pure: time comes in.

A gateway keeps what it was granted until its next lease, so the book counts grants, not wishes: a gateway is given its
target or what the others' last grants leave, whichever is less. Hence at every moment the shares that live gateways
hold of one tenant sum to at most 1; a move of share takes one slice to leave the giver and one to reach the taker.

A book that replaces another (its controller restarted) learns what was granted from the gateways: each reports in its
first lease what it holds, and what no gateway has claimed yet stays out of reach until those that live have had time to
report. A gateway that holds nothing finds no trace of an earlier book: the first lease of all decides.

A place of the concurrency limit that a running request takes is never granted away before the request ends.

Most tenants are idle: they are not listed one by one but covered by the row named ``*``, an even split. A tenant
gets rows of its own while there is demand and until all its grants equal those of ``*`` again.
"""

import math
from collections.abc import Mapping

from loraplex.core.control import QuotaShare, TenantDemand
from loraplex.core.ids import GatewayId, TenantName
from loraplex.core.tenant import TenantLimits
from loraplex.tenancy.config import TenancyConfig

OTHER_TENANTS = TenantName("*")
"""In a lease: every tenant that the lease does not name. No tenant can have this name."""

_WHOLE_PLACES_BELOW = 64
"""Concurrency limits under this are divided in whole places; above it rounding down loses little."""
_TINY = 1e-9
_MIN_WEIGHT = 1e-3


class _Account:
    """One tenant's division. ``granted`` and ``weight`` are keyed by gateway."""

    __slots__ = ("granted", "last_demand_s", "unclaimed", "weight")

    def __init__(self, granted: dict[GatewayId, float], now_s: float, *, unclaimed: float) -> None:
        self.granted = granted
        self.weight: dict[GatewayId, float] = {}
        self.last_demand_s = now_s
        self.unclaimed = unclaimed
        """What gateways that have not reported since the book was begun may hold."""


class ShareBook:
    def __init__(self, config: TenancyConfig) -> None:
        self._config = config
        self._last_seen_s: dict[GatewayId, float] = {}
        self._others = _Account({}, 0.0, unclaimed=0.0)
        self._accounts: dict[TenantName, _Account] = {}
        self._recovered_s: float | None = None
        """From then on nothing is held back for gateways of an earlier book. None until the first lease."""

    def lease(
        self,
        gateway_id: GatewayId,
        demand: tuple[TenantDemand, ...],
        limits: Mapping[TenantName, TenantLimits],
        now_s: float,
        held: tuple[QuotaShare, ...] = (),
    ) -> tuple[QuotaShare, ...]:
        """The shares that ``gateway_id`` holds from now until its next lease, the ``*`` row first.

        ``limits``: of all tenants. Demand of a tenant that is not in it, or has no limits, is ignored. ``held``: the
        answer to the gateway's last lease, empty when it had none; the book heeds it while it does not know better.
        """
        self._drop_silent(now_s)
        self._recover(gateway_id, held, now_s)
        self._last_seen_s[gateway_id] = now_s
        self._grant(self._others, gateway_id, places=None, taken=0.0)
        self._note_demand(gateway_id, demand, limits, now_s)
        running = {row.tenant: row.running for row in demand}
        rows = [QuotaShare(tenant=OTHER_TENANTS, share=self._others.granted[gateway_id])]
        for name, account in list(self._accounts.items()):
            # A deleted tenant stays named until its shares have settled: the name may come back before every gateway
            # has heard that its old share is gone.
            tenant_limits = limits.get(name, TenantLimits())
            places = _whole_places(tenant_limits)
            limit = tenant_limits.max_concurrent_requests
            taken = running.get(name, 0) / limit if limit else 0.0
            self._grant(account, gateway_id, places=places, taken=taken)
            if places is None and self._settled(account, now_s):
                del self._accounts[name]
            else:
                rows.append(QuotaShare(tenant=name, share=account.granted[gateway_id]))
        return tuple(rows)

    def validate(self) -> None:
        for account in (self._others, *self._accounts.values()):
            assert account.granted.keys() <= self._last_seen_s.keys()
            assert all(share >= 0 for share in account.granted.values())
            assert account.unclaimed >= 0
            assert sum(account.granted.values()) + account.unclaimed <= 1 + 1e-6

    def _recover(self, gateway_id: GatewayId, held: tuple[QuotaShare, ...], now_s: float) -> None:
        """Notes what an earlier book granted to a gateway that this one does not know yet."""
        if self._recovered_s is None:
            self._recovered_s = now_s
            if held:
                self._recovered_s += self._config.silent_after_s
                self._others.unclaimed = 1.0
        if now_s >= self._recovered_s:
            for account in (self._others, *self._accounts.values()):
                account.unclaimed = 0.0
        elif gateway_id not in self._last_seen_s:
            shares = {row.tenant: row.share for row in held}
            other_share = shares.pop(OTHER_TENANTS, 0.0)
            for name in shares.keys() - self._accounts.keys():
                self._accounts[name] = self._new_account(now_s)
            _claim(self._others, gateway_id, other_share)
            for name, account in self._accounts.items():
                _claim(account, gateway_id, shares.get(name, other_share))

    def _new_account(self, now_s: float) -> _Account:
        """Of a tenant that ``*`` covered until now."""
        return _Account(dict(self._others.granted), now_s, unclaimed=self._others.unclaimed)

    def _drop_silent(self, now_s: float) -> None:
        silent = [g for g, seen_s in self._last_seen_s.items() if now_s - seen_s > self._config.silent_after_s]
        for gateway_id in silent:
            del self._last_seen_s[gateway_id]
            for account in (self._others, *self._accounts.values()):
                account.granted.pop(gateway_id, None)
                account.weight.pop(gateway_id, None)

    def _note_demand(
        self,
        gateway_id: GatewayId,
        demand: tuple[TenantDemand, ...],
        limits: Mapping[TenantName, TenantLimits],
        now_s: float,
    ) -> None:
        pressure = {
            row.tenant: _pressure(row, limits[row.tenant])
            for row in demand
            if row.tenant in limits and _is_limited(limits[row.tenant])
        }
        for name, tenant_limits in limits.items():
            if name not in self._accounts and (name in pressure or _whole_places(tenant_limits) is not None):
                self._accounts[name] = self._new_account(now_s)
        for name, account in self._accounts.items():
            offered = pressure.get(name, 0.0)
            # Half old, half new: a burst is followed within two slices and a lull does not give all away at once.
            account.weight[gateway_id] = (account.weight.get(gateway_id, 0.0) + offered) / 2
            if offered > 0:
                account.last_demand_s = now_s

    def _grant(self, account: _Account, gateway_id: GatewayId, *, places: int | None, taken: float) -> None:
        held_by_others = sum(share for other, share in account.granted.items() if other != gateway_id)
        wanted = max(self._target(account, gateway_id, places), taken)
        share = max(0.0, min(wanted, 1.0 - account.unclaimed - held_by_others))
        if places:
            share = math.floor(share * places + 1e-6) / places
        account.granted[gateway_id] = share

    def _target(self, account: _Account, gateway_id: GatewayId, places: int | None) -> float:
        gateways = sorted(self._last_seen_s)
        total = sum(account.weight.values())
        even = 1.0 / len(gateways)
        if total < _MIN_WEIGHT:
            wishes = dict.fromkeys(gateways, even)
        else:
            part = self._config.even_part
            wishes = {g: part * even + (1 - part) * account.weight.get(g, 0.0) / total for g in gateways}
        if not places:
            return wishes[gateway_id]
        return _whole_split(wishes, places)[gateway_id] / places

    def _settled(self, account: _Account, now_s: float) -> bool:
        """True when the tenant is idle and every gateway holds of it what ``*`` gives: naming it adds nothing."""
        return (
            now_s - account.last_demand_s > self._config.idle_after_s
            and account.unclaimed == 0
            and all(
                abs(account.granted.get(g, 0.0) - self._others.granted.get(g, 0.0)) < _TINY for g in self._last_seen_s
            )
        )


def _claim(account: _Account, gateway_id: GatewayId, share: float) -> None:
    claimed = min(share, account.unclaimed)
    account.granted[gateway_id] = claimed
    account.unclaimed -= claimed


def _whole_split(wishes: Mapping[GatewayId, float], places: int) -> dict[GatewayId, int]:
    """Largest remainder; ties go to the larger wish, then to the first id. Sums to ``places``."""
    split = {g: math.floor(wish * places + _TINY) for g, wish in wishes.items()}
    rest = places - sum(split.values())
    order = sorted(wishes, key=lambda g: (-(wishes[g] * places - split[g]), -wishes[g], g))
    for gateway_id in order[:rest]:
        split[gateway_id] += 1
    return split


def _is_limited(limits: TenantLimits) -> bool:
    return not (limits.requests_per_minute is limits.tokens_per_minute is limits.max_concurrent_requests is None)


def _whole_places(limits: TenantLimits) -> int | None:
    limit = limits.max_concurrent_requests
    return limit if limit is not None and 0 < limit < _WHOLE_PLACES_BELOW else None


def _pressure(row: TenantDemand, limits: TenantLimits) -> float:
    """The largest fraction of a limit that the gateway asked for: comparable across kinds of limits."""
    pairs = (
        (row.requests, limits.requests_per_minute),
        (row.tokens, limits.tokens_per_minute),
        (max(row.running, row.requests), limits.max_concurrent_requests),
    )
    return max((used / max(limit, 1) for used, limit in pairs if limit is not None), default=0.0)
