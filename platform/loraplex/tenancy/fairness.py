"""How much service each tenant has had, and so whose turn it is. Mutable; called by the engine's scheduler in weighted
tokens and by the router's queue in predicted seconds of GPU time, which share this rule but no counter.

After VTC (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): a tenant's counter grows with what
its requests take, divided by its weight; the smallest counter goes next; a tenant that comes back is lifted to the
smallest counter of those that are there, so that idleness saves up nothing. What is under way counts in the order by
what it is expected to take, but nobody is lifted by that: an expectation that was too high, and is taken back, would
have put whoever came meanwhile behind for what nobody had.
"""

from loraplex.core.ids import TenantName


class ServiceCounters:
    def __init__(self) -> None:
        self._service: dict[TenantName, float] = {}
        self._expected: dict[TenantName, float] = {}
        self._num_active: dict[TenantName, int] = {}

    def enter(self, tenant: TenantName) -> None:
        """A generation of the tenant came, to wait or to run. Changes state."""
        if tenant not in self._num_active:
            floor = min((self._service[active] for active in self._num_active), default=0.0)
            self._service[tenant] = max(self._service.get(tenant, 0.0), floor)
            self._expected[tenant] = 0.0
            self._num_active[tenant] = 0
        self._num_active[tenant] += 1

    def leave(self, tenant: TenantName) -> None:
        """It ended, however that was. Changes state. When nobody is left all start anew."""
        self._num_active[tenant] -= 1
        if self._num_active[tenant] == 0:
            del self._num_active[tenant], self._expected[tenant]
            if not self._num_active:
                self._service.clear()

    def charge(self, tenant: TenantName, service: float, *, weight: float = 1.0) -> None:
        """A tenant that is here has had ``service``. ``weight`` greater than 0: of two tenants that both wait, one of
        weight 2 gets twice as much. Changes state."""
        self._service[tenant] += service / weight

    def expect(self, tenant: TenantName, service: float, *, weight: float = 1.0) -> None:
        """A tenant that is here will have ``service`` by what is under way; negative once it has ended. Changes
        state."""
        self._expected[tenant] += service / weight

    def value(self, tenant: TenantName) -> float:
        """Of a tenant that is here: what it has had and is expected to have, by weight."""
        return self._service[tenant] + self._expected[tenant]

    def validate(self, active: dict[TenantName, int]) -> None:
        """Raises AssertionError unless exactly these generations are here."""
        assert self._num_active == active, "generations per tenant differ"
        assert set(active) <= set(self._service), "a tenant that is here has no counter"
        assert set(active) == set(self._expected), "expected is something of who is not here"
