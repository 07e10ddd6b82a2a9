"""What a metric is: its name with unit, its meaning, its labels and what bounds them. Pure; listed in ``catalogue``."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram", "summary"]

_SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "counter": ("",),
    "gauge": ("",),
    "histogram": ("_bucket", "_sum", "_count"),
    "summary": ("_sum", "_count"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    name: str
    values: str
    """What they are, for the documentation."""
    max_values: int
    """At most, in one process with the default settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricSpec:
    name: str
    """As Prometheus shows it: counters end in ``_total``, times in ``_seconds``, shares in ``_ratio``."""
    kind: Kind
    unit: str
    """Of its value: ``seconds``, ``requests``, ``tokens``, ..."""
    help: str
    labels: tuple[Label, ...] = ()
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram, in ``unit``."""

    @property
    def label_names(self) -> tuple[str, ...]:
        return tuple(label.name for label in self.labels)

    @property
    def series_names(self) -> tuple[str, ...]:
        """Names of its samples, as queries use them."""
        return tuple(self.name + suffix for suffix in _SUFFIXES[self.kind])
