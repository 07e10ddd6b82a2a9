"""The text of ``GET /metrics``: everything for the administrator, sums over tenants and adapters for everybody else."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = CONTENT_TYPE_LATEST

_PRIVATE = frozenset(("tenant", "adapter"))


def render(registry: CollectorRegistry, *, per_tenant: bool) -> bytes:
    """Prometheus text, ``CONTENT_TYPE``. Without ``per_tenant`` it names no tenant and no adapter."""
    return generate_latest(registry if per_tenant else _Summed(registry))


class _Summed(Collector):
    """A view of a registry in which samples that differ in tenant and adapter alone are one."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            sums: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
            for sample in metric.samples:
                labels = tuple((name, value) for name, value in sample.labels.items() if name not in _PRIVATE)
                sums[sample.name, labels] = sums.get((sample.name, labels), 0.0) + sample.value
            summed = Metric(metric.name, metric.documentation, metric.type)
            for (name, labels), value in sums.items():
                summed.add_sample(name, dict(labels), value)
            yield summed
