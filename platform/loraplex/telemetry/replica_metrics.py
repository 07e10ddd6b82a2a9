"""What the engines are and do, as their replicas told this gateway last."""

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry

from loraplex.core.control import ReplicaRoute
from loraplex.core.ids import ReplicaId
from loraplex.core.wire import LoadReport
from loraplex.telemetry import catalogue
from loraplex.telemetry.instruments import Told, Values
from loraplex.telemetry.metric import MetricSpec

_READ: dict[MetricSpec, Callable[[LoadReport], float]] = {
    catalogue.REPLICA_RUNNING: lambda load: load.num_running,
    catalogue.REPLICA_WAITING: lambda load: load.num_waiting,
    catalogue.REPLICA_QUEUED_TOKENS: lambda load: load.num_queued_tokens,
    catalogue.REPLICA_PAGES: lambda load: load.num_pages,
    catalogue.REPLICA_FREE_PAGES: lambda load: load.num_free_pages,
    catalogue.REPLICA_RESIDENT_ADAPTERS: lambda load: len(load.resident_adapters or ()),
    catalogue.REPLICA_STEPS: lambda load: load.steps,
    catalogue.REPLICA_BUSY: lambda load: load.busy_s,
    catalogue.REPLICA_GENERATED_TOKENS: lambda load: load.generated_tokens,
    catalogue.REPLICA_CACHED_TOKENS: lambda load: load.cached_tokens,
    catalogue.REPLICA_PREEMPTIONS: lambda load: load.preemptions,
    catalogue.REPLICA_ADAPTER_LOADS: lambda load: load.adapter_loads,
    catalogue.REPLICA_ADAPTER_PREFETCHES: lambda load: load.adapter_prefetches,
    catalogue.REPLICA_ADAPTER_HITS: lambda load: load.adapter_hits,
}


class ReplicaMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._told = Told((catalogue.REPLICA_INFO, *_READ), registry)

    def replace(self, loads: Mapping[ReplicaId, LoadReport], routes: Iterable[ReplicaRoute]) -> None:
        """The last report of each replica that is connected, and the routes of all; those that are gone disappear."""
        values: dict[MetricSpec, Values] = {
            spec: {(replica_id,): read(load) for replica_id, load in loads.items()} for spec, read in _READ.items()
        }
        values[catalogue.REPLICA_INFO] = {
            (route.replica_id, route.base_model_id, route.group, route.gpu): 1.0
            for route in routes
            if route.replica_id in loads
        }
        self._told.replace(values)
