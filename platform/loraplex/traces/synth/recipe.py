"""What a made-up trace is to look like. Built by the CLI from its options, by tests and by experiments."""

import math
from enum import StrEnum

import msgspec

from loraplex.core.errors import BadConfig


class Popularity(StrEnum):
    """How the rate is shared between adapters, as AlpaServe's ``rate_distribution``."""

    UNIFORM = "uniform"
    POWER_LAW = "power-law"
    """Adapter i gets (i + 1) ** -skew; skew 1 is Zipf's law."""
    LINEAR = "linear"
    """Adapter i of n gets n - i (AlpaServe's ``triangle_decay``)."""


class Process(StrEnum):
    """Gaps between the arrivals of one adapter."""

    GAMMA = "gamma"
    """Independent Gamma gaps with coefficient of variation ``cv``."""
    POISSON = "poisson"
    """Gamma with cv 1."""
    UNIFORM = "uniform"
    """Equal gaps, with a random phase for each adapter."""


def _positive(part: msgspec.Struct, *names: str) -> None:
    for name in names:
        value = getattr(part, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise BadConfig(f"{name} is {value}, must be greater than 0", param=name)


def _not_negative(part: msgspec.Struct, *names: str) -> None:
    for name in names:
        value = getattr(part, name)
        if not (value >= 0 and math.isfinite(value)):
            raise BadConfig(f"{name} is {value}, must not be negative", param=name)


class Diurnal(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rate times 1 - amplitude * cos(2 pi t / period): lowest at time 0, the mean stays."""

    period_s: float = 86400.0
    amplitude: float = 0.8

    def __post_init__(self) -> None:
        _positive(self, "period_s")
        if not 0 <= self.amplitude <= 1:
            raise BadConfig(f"amplitude is {self.amplitude}, must be from 0 to 1", param="amplitude")


class FlashCrowd(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """For ``duration_s`` seconds, ``factor`` times the rate of the ``count`` adapters from ``first`` on."""

    at_s: float
    duration_s: float
    factor: float
    first: int = 0
    count: int | None = None
    """None: all from ``first`` on."""

    def __post_init__(self) -> None:
        _positive(self, "duration_s", "factor", "count")
        _not_negative(self, "at_s", "first")


class Drift(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Popularity moves on: in window w of ``every_s`` seconds, adapter i has rank (i - shift * w) mod n."""

    every_s: float
    shift: int = 1

    def __post_init__(self) -> None:
        _positive(self, "every_s")


class OnOff(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Each adapter is on and off in turn, for exponential times; while on, its rate is higher: the mean stays."""

    mean_on_s: float
    mean_off_s: float

    def __post_init__(self) -> None:
        _positive(self, "mean_on_s", "mean_off_s")


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """At least one of ``duration_s`` and ``requests`` ends the trace, whichever comes first."""

    adapters: int = 16
    tenants: int = 1
    tenant_skew: float = 0.0
    """Tenant j owns a share (j + 1) ** -tenant_skew of the adapters."""
    base_models: tuple[tuple[str, int], ...] = ()
    """(name, share of the adapters); empty: the trace does not name a base."""
    rate: float = 10.0
    """Requests a second, all adapters together, before flash crowds."""
    duration_s: float | None = None
    requests: int | None = None
    popularity: Popularity = Popularity.POWER_LAW
    skew: float = 0.5
    process: Process = Process.GAMMA
    cv: float = 1.0
    diurnal: Diurnal | None = None
    flash_crowds: tuple[FlashCrowd, ...] = ()
    drift: Drift | None = None
    on_off: OnOff | None = None
    lengths: str = "lognormal:512,1,128,1"
    """As ``lengths.parse_lengths`` takes it."""
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None
    seed: int = 0
    """Adapter i draws its gaps from numpy's ``RandomState(seed + i)``, as AlpaServe's traces do with seed 0."""

    def __post_init__(self) -> None:
        _positive(self, "adapters", "tenants", "rate", "duration_s", "requests", "cv")
        _positive(self, "max_prompt_tokens", "max_output_tokens")
        _not_negative(self, "tenant_skew", "skew", "seed")
        if self.duration_s is None and self.requests is None:
            raise BadConfig("how long? Give a duration or a number of requests", param="duration_s")
        if self.tenants > self.adapters:
            raise BadConfig(f"{self.tenants} tenants share {self.adapters} adapters: some have none", param="tenants")
        if self.seed + self.adapters > 2**32:
            raise BadConfig(f"seed is {self.seed}, must be under 2**32 - adapters", param="seed")
        if any(share <= 0 for _, share in self.base_models):
            raise BadConfig("the share of a base model must be greater than 0", param="base_models")
