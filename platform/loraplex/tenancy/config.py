"""Settings of tenancy, gateway side and controller side."""

import msgspec


class TenancyConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    slice_s: float = 1.0
    """How often a gateway renews its shares of the tenants' limits; also what a client is told to wait for when a
    gateway holds no share yet."""
    silent_after_s: float = 5.0
    """A gateway that did not renew for so long loses its shares to the others."""
    idle_after_s: float = 10.0
    """A tenant without requests for so long is divided evenly again."""
    even_part: float = 0.2
    """Fraction of a tenant's limits that is divided evenly whatever the demand, so that every gateway can admit a
    first request. 0 <= even_part <= 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.even_part <= 1:
            raise ValueError("even_part must lie in [0, 1]")
        if min(self.slice_s, self.silent_after_s, self.idle_after_s) <= 0:
            raise ValueError("slice_s, silent_after_s and idle_after_s must be positive")
        if self.silent_after_s <= self.slice_s:
            raise ValueError("silent_after_s must exceed slice_s")
