"""Holds the newest snapshot and wakes who waits for it. Event loop only; knows nothing of where the parts come from."""

import asyncio
from collections.abc import Mapping
from dataclasses import replace

from loraplex.controller.catalog import CatalogView
from loraplex.core.control import AdapterView, BaseModelView, ControlSnapshot, ReplicaRoute
from loraplex.core.errors import Unavailable
from loraplex.core.ids import ReplicaId, TenantName
from loraplex.core.tenant import TenantLimits


class SnapshotBoard:
    """A new version per change; the parts that did not change are shared between versions."""

    def __init__(self, *, epoch: int, cluster_secret: str, catalog: CatalogView) -> None:
        self._limits = catalog.limits
        self._adapter_keys: frozenset[tuple[TenantName, str]] = frozenset()
        self._keys_of: tuple[AdapterView, ...] = ()
        self._changed = asyncio.Event()
        self._current = ControlSnapshot(
            epoch=epoch,
            version=1,
            tenants=catalog.tenants,
            keys=catalog.keys,
            adapters=catalog.adapters,
            base_models=(),
            routes=(),
            cluster_secret=cluster_secret,
        )

    @property
    def current(self) -> ControlSnapshot:
        return self._current

    @property
    def limits(self) -> Mapping[TenantName, TenantLimits]:
        return self._limits

    @property
    def adapter_keys(self) -> frozenset[tuple[TenantName, str]]:
        """(Tenant, name) of all adapters."""
        if self._keys_of is not self._current.adapters:
            self._keys_of = self._current.adapters
            self._adapter_keys = frozenset((adapter.ref.tenant, adapter.ref.name) for adapter in self._keys_of)
        return self._adapter_keys

    @property
    def lora_ranks(self) -> dict[str, int]:
        """Of ``tenant/name``, the current version's largest."""
        return {
            f"{adapter.ref.tenant}/{adapter.ref.name}": adapter.max_lora_rank
            for adapter in self._current.adapters
            if adapter.current
        }

    def set_catalog(self, catalog: CatalogView) -> None:
        self._limits = catalog.limits
        self._show(replace(self._current, tenants=catalog.tenants, keys=catalog.keys, adapters=catalog.adapters))

    def set_base_models(self, base_models: tuple[BaseModelView, ...]) -> None:
        self._show(replace(self._current, base_models=base_models))

    def set_route(self, route: ReplicaRoute) -> None:
        """Adds the replica, or replaces its route."""
        others = tuple(other for other in self._current.routes if other.replica_id != route.replica_id)
        self._show(replace(self._current, routes=(*others, route)))

    def set_routes(self, routes: tuple[ReplicaRoute, ...], *, asleep: bool) -> None:
        """The whole table at once: nobody sees a part of a change. ``asleep``: as in ``ControlSnapshot``."""
        self._show(replace(self._current, routes=routes, asleep=asleep))

    def remove_route(self, replica_id: ReplicaId) -> None:
        routes = tuple(route for route in self._current.routes if route.replica_id != replica_id)
        self._show(replace(self._current, routes=routes))

    async def newer_than(self, epoch: int, version: int, *, timeout_s: float) -> ControlSnapshot | None:
        """At once when there is one; None after ``timeout_s``. Raises Unavailable to who knows a later epoch."""
        if epoch > self._current.epoch:
            raise Unavailable(
                f"this controller (epoch {self._current.epoch}) was replaced by one of epoch {epoch}", code="superseded"
            )
        try:
            async with asyncio.timeout(timeout_s):
                while (self._current.epoch, self._current.version) <= (epoch, version):
                    await self._changed.wait()
        except TimeoutError:
            return None
        return self._current

    def _show(self, candidate: ControlSnapshot) -> None:
        if candidate == self._current:
            return
        self._current = replace(candidate, version=self._current.version + 1)
        self._changed.set()
        self._changed = asyncio.Event()
