"""Sends each client request to a replica and keeps it alive: the Dispatcher of one gateway.

Owns the links to replicas and the queue of what waits for a credit; decisions are ``policy``'s. A request whose
replica is lost goes elsewhere, or to the same one after it is back, with the tokens it has: none is lost or sent twice.
Lives on the gateway's event loop; nothing here blocks.
"""

import asyncio
import logging
from collections.abc import Callable

from loraplex.core.control import ReplicaRoute
from loraplex.core.errors import LoraplexError, Overloaded, ReplicaLost, Unavailable
from loraplex.core.ids import BaseModelId, GatewayId, ReplicaId
from loraplex.core.request import EngineRequest
from loraplex.core.wire import LoadReport
from loraplex.router.client import GrpcReplicaClient, ReplicaClient, ReplicaListener
from loraplex.router.config import RouterConfig
from loraplex.router.link import Link
from loraplex.router.policy import choose_replica
from loraplex.router.queue import RouterQueue
from loraplex.router.stream import Generation, RoutedStream

_log = logging.getLogger(__name__)

Connect = Callable[[ReplicaRoute, ReplicaListener], ReplicaClient]


class Router:
    """Implements ``core.generation.Dispatcher``."""

    def __init__(
        self, *, gateway_id: GatewayId, config: RouterConfig | None = None, connect: Connect | None = None
    ) -> None:
        """``connect`` opens the stream to a replica; by default gRPC."""
        self._gateway_id = gateway_id
        self._config = config or RouterConfig()
        self._connect = connect or self._connect_grpc
        self._cluster_secret = ""
        self._links: dict[ReplicaId, Link] = {}
        self._leaving: set[Link] = set()
        self._queue = RouterQueue()
        self._order = 0
        self._closing: set[asyncio.Task[None]] = set()

    def update(self, routes: tuple[ReplicaRoute, ...], cluster_secret: str) -> None:
        """Takes the route table: connects to new replicas; those that are gone finish what they run. Needs a running
        event loop. The secret is used from the next connection on."""
        self._cluster_secret = cluster_secret
        wanted = {route.replica_id: route for route in routes}
        for replica_id, link in tuple(self._links.items()):
            if wanted.get(replica_id) != link.route:
                del self._links[replica_id]
                link.draining = True
                self._leaving.add(link)
                self._close_if_empty(link)
        for replica_id, route in wanted.items():
            if replica_id not in self._links:
                link = self._links[replica_id] = Link(route, self)
                link.client = self._connect(route, link)
        self._fail_unrouted()

    def dispatch(self, requests: tuple[EngineRequest, ...]) -> RoutedStream:
        base_model_id = requests[0].base_model_id
        if not any(link.route.base_model_id == base_model_id for link in self._links.values()):
            raise Unavailable(f"no replica serves {base_model_id} now", retry_after_s=2.0)
        self._order += 1
        stream = RoutedStream(requests, order=self._order, on_abort=self._abort)
        queued = self._queue.num_generations(base_model_id)
        if queued or not self._place(stream):
            if queued + len(requests) > self._config.max_queued_requests:
                raise Overloaded(
                    f"{queued} requests wait for {base_model_id} already",
                    retry_after_s=self._retry_after_s(base_model_id),
                )
            self._wait(stream, self._config.max_queue_wait_s)
        return stream

    def loads(self) -> dict[ReplicaId, LoadReport]:
        """Last reports of the replicas that are up, those that only finish what they run among them."""
        return {link.route.replica_id: link.load for link in (*self._leaving, *self._links.values()) if link.up}

    def num_queued(self) -> int:
        """Generations that wait for a replica."""
        return sum(self._queue.num_generations(base_model_id) for base_model_id in self._queue.bases())

    async def close(self) -> None:
        """Ends all streams with Unavailable and all connections. Idempotent."""
        links = [*self._links.values(), *self._leaving]
        self._links.clear()
        self._leaving.clear()
        error = Unavailable("the gateway is stopping")
        for stream in self._queue.all():
            self._unwait(stream)
            stream.fail(error)
        for link in links:
            for generation in link.generations.values():
                generation.stream.fail(error)
            link.generations.clear()
        await asyncio.gather(*(link.client.close() for link in links if link.client is not None), *self._closing)

    def link_changed(self, link: Link) -> None:
        """For ``Link`` only."""
        self._close_if_empty(link)
        self._pump(link.route.base_model_id)

    def link_lost(self, link: Link, generations: list[Generation]) -> None:
        """For ``Link`` only."""
        for generation in generations:
            self._queue.placed(generation.request.tenant, -1)
        for stream in {generation.stream: None for generation in generations}:
            stream.num_losses += 1
            if stream.num_losses >= self._config.max_losses:
                stream.fail(ReplicaLost(f"{stream.num_losses} replicas in a row were lost while they ran this request"))
            else:
                stream.resumed = True
                self._wait(stream, self._config.resume_timeout_s)
        self._close_if_empty(link)
        self._pump(link.route.base_model_id)

    def generation_ended(self, generation: Generation) -> None:
        """For ``Link`` only."""
        self._queue.placed(generation.request.tenant, -1)

    def _connect_grpc(self, route: ReplicaRoute, listener: ReplicaListener) -> ReplicaClient:
        return GrpcReplicaClient(
            route.address,
            gateway_id=self._gateway_id,
            cluster_secret=lambda: self._cluster_secret,
            listener=listener,
            config=self._config,
        )

    def _pump(self, base_model_id: BaseModelId) -> None:
        while (stream := self._queue.next(base_model_id)) is not None and self._place(stream):
            self._unwait(stream)

    def _place(self, stream: RoutedStream) -> bool:
        request = stream.first
        digest = request.adapter.digest if request.adapter is not None else None
        links = {
            link.route.replica_id: link
            for link in self._links.values()
            if link.up and link.route.base_model_id == request.base_model_id
        }
        chosen = choose_replica(
            [link.view(digest) for link in links.values()],
            request,
            load_slack=self._config.load_slack,
            load_bound=self._config.load_bound,
        )
        if chosen is None:
            return False
        self._queue.placed(request.tenant, len(stream.generations))
        links[chosen].place(stream)
        return True

    def _wait(self, stream: RoutedStream, timeout_s: float) -> None:
        self._queue.push(stream)
        stream.timer = asyncio.get_running_loop().call_later(timeout_s, self._expire, stream)

    def _unwait(self, stream: RoutedStream) -> None:
        self._queue.remove(stream)
        if stream.timer is not None:
            stream.timer.cancel()
            stream.timer = None

    def _expire(self, stream: RoutedStream) -> None:
        self._unwait(stream)
        base_model_id = stream.first.base_model_id
        error: LoraplexError
        if stream.resumed:
            error = ReplicaLost(f"the replica of {base_model_id} was lost and none could take over")
        elif any(link.up for link in self._links.values() if link.route.base_model_id == base_model_id):
            error = Overloaded(
                f"no replica of {base_model_id} had room in time", retry_after_s=self._retry_after_s(base_model_id)
            )
        else:
            error = Unavailable(f"no replica of {base_model_id} is up", retry_after_s=2.0)
        stream.fail(error)

    def _fail_unrouted(self) -> None:
        """What waits for a base that no replica serves any more, and never will by this table, waits in vain."""
        served = {link.route.base_model_id for link in self._links.values()}
        for stream in self._queue.all():
            if stream.first.base_model_id not in served and not stream.resumed:
                self._unwait(stream)
                stream.fail(Unavailable(f"no replica serves {stream.first.base_model_id} now", retry_after_s=2.0))

    def _abort(self, stream: RoutedStream) -> None:
        self._unwait(stream)
        for link in (*self._links.values(), *self._leaving):
            count = link.abort(stream)
            if count:
                self._queue.placed(stream.first.tenant, -count)
                self._close_if_empty(link)

    def _close_if_empty(self, link: Link) -> None:
        if not link.draining or link.generations or link not in self._leaving:
            return
        self._leaving.discard(link)
        if link.client is not None:
            task = asyncio.get_running_loop().create_task(link.client.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def _retry_after_s(self, base_model_id: BaseModelId) -> float:
        """Grows with the queue in units of what runs now: one queue length takes about as long as one request."""
        running = sum(
            len(link.generations) for link in self._links.values() if link.route.base_model_id == base_model_id
        )
        return min(30.0, 1.0 + self._queue.num_generations(base_model_id) / max(1, running))
