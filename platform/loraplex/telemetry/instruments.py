"""Prometheus instruments made from specs of the catalogue: the only place that registers a metric."""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary, disable_created_metrics
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from loraplex.telemetry.metric import MetricSpec

# A `_created` series beside each counter would double the size of the endpoint and tells nothing that is asked for.
disable_created_metrics()  # type: ignore[no-untyped-call]


def counter(spec: MetricSpec, registry: CollectorRegistry) -> Counter:
    assert spec.kind == "counter", spec.name
    return Counter(spec.name.removesuffix("_total"), spec.help, spec.label_names, registry=registry)


def gauge(spec: MetricSpec, registry: CollectorRegistry) -> Gauge:
    assert spec.kind == "gauge", spec.name
    return Gauge(spec.name, spec.help, spec.label_names, registry=registry)


def histogram(spec: MetricSpec, registry: CollectorRegistry) -> Histogram:
    assert spec.kind == "histogram", spec.name
    return Histogram(spec.name, spec.help, spec.label_names, buckets=spec.buckets, registry=registry)


def summary(spec: MetricSpec, registry: CollectorRegistry) -> Summary:
    assert spec.kind == "summary", spec.name
    return Summary(spec.name, spec.help, spec.label_names, registry=registry)


Values = Mapping[tuple[str, ...], float]
"""By the values of the labels, in their order."""


class Told(Collector):
    """Counters and gauges that another process keeps: what it told last, as a whole."""

    def __init__(self, specs: tuple[MetricSpec, ...], registry: CollectorRegistry) -> None:
        assert all(spec.kind in ("counter", "gauge") for spec in specs)
        self._values: dict[MetricSpec, Values] = {spec: {} for spec in specs}
        registry.register(self)

    def replace(self, values: Mapping[MetricSpec, Values]) -> None:
        """What is not among ``values`` is unknown from now on."""
        assert self._values.keys() >= values.keys(), "a metric that was not announced"
        self._values = {spec: dict(values.get(spec, {})) for spec in self._values}

    def collect(self) -> Iterator[Metric]:
        for spec, values in self._values.items():
            family: CounterMetricFamily | GaugeMetricFamily
            if spec.kind == "counter":
                family = CounterMetricFamily(spec.name.removesuffix("_total"), spec.help, labels=spec.label_names)
            else:
                family = GaugeMetricFamily(spec.name, spec.help, labels=spec.label_names)
            for labels, value in values.items():
                family.add_metric(labels, value)
            yield family
