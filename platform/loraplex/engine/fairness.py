"""Virtual token counters: which tenant has had least of the engine.

After VTC (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): each tenant's counter grows with the
service it gets, the smallest counter is served next, and a tenant that comes back from idleness is lifted to the
smallest active counter, so that idleness saves up nothing. Called by ``scheduler``.
"""

from loraplex.core.ids import TenantName


class TenantCounters:
    def __init__(self) -> None:
        self._counters: dict[TenantName, float] = {}
        self._num_active: dict[TenantName, int] = {}

    def enter(self, tenant: TenantName) -> None:
        """A request of the tenant arrived. Changes state."""
        if tenant not in self._num_active:
            floor = min((self._counters[t] for t in self._num_active), default=0.0)
            self._counters[tenant] = max(self._counters.get(tenant, 0.0), floor)
            self._num_active[tenant] = 0
        self._num_active[tenant] += 1

    def leave(self, tenant: TenantName) -> None:
        """A request of the tenant ended. Changes state. When nobody is left all start anew."""
        self._num_active[tenant] -= 1
        if self._num_active[tenant] == 0:
            del self._num_active[tenant]
            if not self._num_active:
                self._counters.clear()

    def charge(self, tenant: TenantName, cost: float) -> None:
        """Changes state."""
        self._counters[tenant] += cost

    def value(self, tenant: TenantName) -> float:
        """Service that an active tenant has had, in units of the configured token costs."""
        return self._counters[tenant]

    def validate(self, active: dict[TenantName, int]) -> None:
        assert self._num_active == active, "active requests per tenant differ"
        assert set(active) <= set(self._counters), "an active tenant has no counter"
