"""Which replicas the plan names for an adapter, and by what weights. Changed with the routes by ``pool``, its owner."""

from collections.abc import Iterable, Mapping

from loraplex.core.control import ReplicaRoute
from loraplex.core.ids import ReplicaId
from loraplex.core.request import EngineRequest

PlannedName = tuple[str | None, str]
"""Of an adapter in a plan: its tenant, if the plan says so, and its name."""


class PlannedHomes:
    def __init__(self) -> None:
        self._weights: dict[PlannedName, dict[ReplicaId, float]] = {}

    def update(self, routes: Iterable[ReplicaRoute]) -> None:
        """What earlier routes named is forgotten."""
        self._weights = {}
        for route in routes:
            for share in route.adapters:
                self._weights.setdefault((share.tenant, share.name), {})[route.replica_id] = share.weight

    def name_of(self, request: EngineRequest) -> PlannedName | None:
        """None: the plan places nothing for it."""
        if request.adapter is None or not self._weights:
            return None
        for name in ((request.adapter.tenant, request.adapter.name), (None, request.adapter.name)):
            if name in self._weights:
                return name
        return None

    def weights(self, name: PlannedName) -> Mapping[ReplicaId, float]:
        """Empty: no route names it any more."""
        return self._weights.get(name, {})
