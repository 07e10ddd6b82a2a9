"""Sends each client request to a replica and keeps it alive: the Dispatcher of one gateway.

Makes the links to replicas by the route table, and a ``Pool`` for each base, which does the rest. A request whose
replica is lost goes elsewhere, or to the same one after it is back, with the tokens it has: none is lost or sent twice.
Lives on the gateway's event loop; nothing here blocks.
"""

import asyncio
from collections.abc import Callable
from dataclasses import replace

from loraplex.core.control import ReplicaRoute
from loraplex.core.errors import LoraplexError, Unavailable
from loraplex.core.ids import BaseModelId, GatewayId, ReplicaId
from loraplex.core.request import EngineRequest
from loraplex.core.wire import LoadReport
from loraplex.router.client import GrpcReplicaClient, ReplicaClient, ReplicaListener
from loraplex.router.config import RouterConfig
from loraplex.router.link import Link
from loraplex.router.pool import Pool
from loraplex.router.rates import RateBook
from loraplex.router.stream import RoutedStream
from loraplex.telemetry.tracing import NO_SPAN, Tracing

Connect = Callable[[ReplicaRoute, ReplicaListener], ReplicaClient]


class Router:
    """Implements ``core.generation.Dispatcher``."""

    def __init__(
        self,
        *,
        gateway_id: GatewayId,
        config: RouterConfig | None = None,
        connect: Connect | None = None,
        on_unserved: Callable[[BaseModelId], None] | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        """``connect`` opens the stream to a replica; by default gRPC. ``on_unserved`` hears, once a second at most and
        as long as it is so, that requests wait for a base that no replica takes requests of; called on the event
        loop, must not block. BadConfig for a cost profile that cannot be read."""
        self._gateway_id = gateway_id
        self._config = config or RouterConfig()
        self._connect = connect or self._connect_grpc
        self._on_unserved = on_unserved
        self._tracing = tracing or Tracing()
        self._cluster_secret = ""
        self._rates = RateBook(self._config)
        self._pools: dict[BaseModelId, Pool] = {}
        self._order = 0
        self._closing: set[asyncio.Task[None]] = set()

    def update(self, routes: tuple[ReplicaRoute, ...], cluster_secret: str) -> None:
        """Takes the route table: connects to new replicas; what runs on those that drain or are gone moves to others or
        ends there. Needs a running event loop. The secret is used from the next connection on."""
        self._cluster_secret = cluster_secret
        wanted = {route.replica_id: route for route in routes}
        for pool in self._pools.values():
            for link in pool.links:
                route = wanted.get(link.route.replica_id)
                if pool.link(link.route.replica_id) is not link:
                    continue
                if route is None or _place_of(route) != _place_of(link.route):
                    pool.drop(link)
                else:
                    link.change_route(route)
        for route in routes:
            pool = self._pool(route.base_model_id)
            if pool.link(route.replica_id) is None:
                link = Link(route, pool, self._rates)
                link.client = self._connect(route, link)
                pool.add(link)
        for pool in self._pools.values():
            pool.routes_changed()

    def dispatch(self, requests: tuple[EngineRequest, ...]) -> RoutedStream:
        pool = self._pool(requests[0].base_model_id)
        self._order += 1
        span = self._tracing.child("router", requests[0].traceparent, kind="client")
        if span is not NO_SPAN:
            span.set(num_choices=len(requests), gateway=self._gateway_id)
            requests = tuple(replace(request, traceparent=span.traceparent) for request in requests)
        stream = RoutedStream(requests, order=self._order, on_abort=pool.abort, span=span)
        try:
            pool.dispatch(stream)
        except LoraplexError as error:
            span.end(error=error.code)
            raise
        return stream

    def loads(self) -> dict[ReplicaId, LoadReport]:
        """Last reports of the replicas that are up, those that only finish what they run among them; each names the
        resident adapters."""
        links = (link for pool in self._pools.values() for link in pool.links)
        return {link.route.replica_id: link.report for link in links if link.up}

    def num_queued(self) -> int:
        """Generations that wait for a replica."""
        return sum(pool.num_queued for pool in self._pools.values())

    async def close(self) -> None:
        """Ends all streams with Unavailable and all connections. Idempotent."""
        clients = [link.client for pool in self._pools.values() for link in pool.links if link.client is not None]
        for pool in self._pools.values():
            pool.close(Unavailable("the gateway is stopping"))
        await asyncio.gather(*(client.close() for client in clients), *self._closing)

    def validate(self) -> None:
        """Raises AssertionError on a broken invariant."""
        for pool in self._pools.values():
            pool.validate()

    def _pool(self, base_model_id: BaseModelId) -> Pool:
        pool = self._pools.get(base_model_id)
        if pool is None:
            pool = self._pools[base_model_id] = Pool(
                base_model_id, self._config, on_unserved=self._on_unserved, on_empty=self._disconnect
            )
        return pool

    def _connect_grpc(self, route: ReplicaRoute, listener: ReplicaListener) -> ReplicaClient:
        return GrpcReplicaClient(
            route.address,
            gateway_id=self._gateway_id,
            cluster_secret=lambda: self._cluster_secret,
            listener=listener,
            config=self._config,
        )

    def _disconnect(self, link: Link) -> None:
        if link.client is not None:
            task = asyncio.get_running_loop().create_task(link.client.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)


def _place_of(route: ReplicaRoute) -> tuple[str, BaseModelId]:
    """What differs in this is another replica."""
    return route.address, route.base_model_id
