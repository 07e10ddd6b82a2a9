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
from loraplex.core.ids import BaseModelId, Digest, GatewayId, ReplicaId
from loraplex.core.request import EngineRequest
from loraplex.core.wire import LoadReport
from loraplex.router.client import GrpcReplicaClient, ReplicaClient, ReplicaListener
from loraplex.router.config import RouterConfig
from loraplex.router.link import Link
from loraplex.router.policy import Demand, choose_replica, hash64, prefix_key
from loraplex.router.prediction import OutputLengths
from loraplex.router.queue import RouterQueue
from loraplex.router.rates import RateBook
from loraplex.router.stream import Generation, RoutedStream

_log = logging.getLogger(__name__)

_REMIND_S = 1.0
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
    ) -> None:
        """``connect`` opens the stream to a replica; by default gRPC. ``on_unserved`` hears, once a second at most and
        as long as it is so, that requests wait for a base that no replica takes requests of; called on the event
        loop, must not block."""
        self._gateway_id = gateway_id
        self._on_unserved = on_unserved
        self._reminders: dict[BaseModelId, asyncio.TimerHandle] = {}
        self._config = config or RouterConfig()
        self._connect = connect or self._connect_grpc
        self._cluster_secret = ""
        self._links: dict[ReplicaId, Link] = {}
        self._leaving: set[Link] = set()
        self._rates = RateBook(self._config)
        self._lengths = OutputLengths(self._config.expected_output_tokens)
        self._queue = RouterQueue()
        self._order = 0
        self._closing: set[asyncio.Task[None]] = set()

    def update(self, routes: tuple[ReplicaRoute, ...], cluster_secret: str) -> None:
        """Takes the route table: connects to new replicas; what runs on those that drain or are gone moves to others or
        ends there. Needs a running event loop. The secret is used from the next connection on."""
        self._cluster_secret = cluster_secret
        wanted = {route.replica_id: route for route in routes}
        for replica_id, link in tuple(self._links.items()):
            route = wanted.get(replica_id)
            if route is None or _place_of(route) != _place_of(link.route):
                del self._links[replica_id]
                self._leaving.add(link)
                self._drain(link, True)
            else:
                link.change_route(route)
                self._drain(link, route.draining)
        for replica_id, route in wanted.items():
            if replica_id not in self._links:
                link = self._links[replica_id] = Link(route, self, self._rates)
                link.client = self._connect(route, link)
                self._drain(link, route.draining)
        for base_model_id in self._queue.bases():
            self._look_after(base_model_id)
        for base_model_id in {link.route.base_model_id for link in (*self._leaving, *self._links.values())}:
            self._pump(base_model_id)
        for link in tuple(self._leaving):
            self._close_if_empty(link)

    def dispatch(self, requests: tuple[EngineRequest, ...]) -> RoutedStream:
        base_model_id = requests[0].base_model_id
        served = self._is_served(base_model_id)
        wait_s = self._config.max_queue_wait_s if served else self._config.max_unserved_wait_s
        if wait_s == 0:
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
            self._wait(stream, wait_s)
            self._look_after(base_model_id)
        return stream

    def loads(self) -> dict[ReplicaId, LoadReport]:
        """Last reports of the replicas that are up, those that only finish what they run among them; each names the
        resident adapters."""
        return {link.route.replica_id: link.report for link in (*self._leaving, *self._links.values()) if link.up}

    def num_queued(self) -> int:
        """Generations that wait for a replica."""
        return sum(self._queue.num_generations(base_model_id) for base_model_id in self._queue.bases())

    async def close(self) -> None:
        """Ends all streams with Unavailable and all connections. Idempotent."""
        links = [*self._links.values(), *self._leaving]
        self._links.clear()
        self._leaving.clear()
        error = Unavailable("the gateway is stopping")
        for reminder in self._reminders.values():
            reminder.cancel()
        self._reminders.clear()
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
            self._unwait(stream)
            if stream.num_losses >= self._config.max_losses:
                error = ReplicaLost(f"{stream.num_losses} replicas in a row were lost while they ran this request")
                self._give_up(stream, error)
            else:
                stream.resumed = True
                self._wait(stream, self._config.resume_timeout_s)
        self._close_if_empty(link)
        self._pump(link.route.base_model_id)
        self._look_after(link.route.base_model_id)

    def generation_ended(self, generation: Generation) -> None:
        """For ``Link`` only."""
        self._queue.placed(generation.request.tenant, -1)
        self._lengths.ended(generation.request.base_model_id, len(generation.token_ids))

    def generation_refused(self, link: Link, generation: Generation) -> bool:
        """For ``Link`` only."""
        stream = generation.stream
        stream.refused_by |= {link.route.replica_id}
        if not any(other.route.replica_id not in stream.refused_by for other in self._takers(stream)):
            return False
        self._queue.placed(generation.request.tenant, -1)
        if stream.timer is None and not self._place(stream):
            self._wait(stream, self._config.max_queue_wait_s)
        return True

    def _connect_grpc(self, route: ReplicaRoute, listener: ReplicaListener) -> ReplicaClient:
        return GrpcReplicaClient(
            route.address,
            gateway_id=self._gateway_id,
            cluster_secret=lambda: self._cluster_secret,
            listener=listener,
            config=self._config,
        )

    def _pump(self, base_model_id: BaseModelId) -> None:
        self._move_off_draining(base_model_id)
        while (stream := self._queue.next(base_model_id)) is not None and self._place(stream):
            self._unwait(stream)

    def _place(self, stream: RoutedStream) -> bool:
        """Sends what runs nowhere to one replica; False when none has a credit."""
        link = self._choose(stream)
        if link is None:
            return False
        self._send(stream, link)
        return True

    def _choose(self, stream: RoutedStream) -> Link | None:
        takers = self._takers(stream)
        willing = [link for link in takers if link.route.replica_id not in stream.refused_by] or takers
        choice = choose_replica([link.view for link in willing], self._demand(stream), self._config)
        return None if choice is None else self._links[choice.view.replica_id]

    def _demand(self, stream: RoutedStream) -> Demand:
        request = stream.first
        digest = request.adapter.digest if request.adapter is not None else None
        return Demand(
            key=prefix_key(request) if digest is None else hash64(digest.encode()),
            prompt_tokens=len(request.prompt_token_ids) + len(request.resumed_token_ids),
            output_tokens=self._lengths.expected(request.base_model_id),
            digest=digest,
            absence_s=lambda view: self._links[view.replica_id].absence_s(digest or Digest("")),
        )

    def _send(self, stream: RoutedStream, link: Link) -> None:
        pending = stream.pending
        self._queue.placed(stream.first.tenant, len(pending))
        link.place(pending)

    def _takers(self, stream: RoutedStream) -> list[Link]:
        """Links to replicas that may run it, up or not."""
        base_model_id = stream.first.base_model_id
        return [
            link
            for link in self._links.values()
            if link.drain_since_s is None and link.route.base_model_id == base_model_id
        ]

    def _is_served(self, base_model_id: BaseModelId) -> bool:
        return any(
            link.drain_since_s is None and link.route.base_model_id == base_model_id for link in self._links.values()
        )

    def _drain(self, link: Link, draining: bool) -> None:
        if not draining:
            link.drain_since_s = None
        elif link.drain_since_s is None:
            loop = asyncio.get_running_loop()
            link.drain_since_s = loop.time()
            loop.call_later(self._config.drain_timeout_s, self._move_off_draining, link.route.base_model_id)

    def _move_off_draining(self, base_model_id: BaseModelId) -> None:
        """What draining replicas run goes to others, as far as it is due and they have room."""
        now_s = asyncio.get_running_loop().time()
        for link in (*self._leaving, *self._links.values()):
            if link.drain_since_s is None or link.route.base_model_id != base_model_id or not link.generations:
                continue
            overdue = now_s >= link.drain_since_s + self._config.drain_timeout_s
            for stream in {generation.stream: None for generation in link.generations.values()}:
                if overdue or self._remaining_s(stream, link) > self._config.drain_migrate_above_s:
                    self._move(stream, link)
            self._close_if_empty(link)

    def _remaining_s(self, stream: RoutedStream, link: Link) -> float:
        output = self._lengths.expected(stream.first.base_model_id)
        left = max(min(generation.num_left, output) for generation in stream.generations.values())
        return left * link.view.decode_s(output)

    def _move(self, stream: RoutedStream, source: Link) -> None:
        """To another replica, unless none has a credit."""
        link = self._choose(stream)
        if link is not None:
            taken = source.take_back(stream)
            self._queue.placed(stream.first.tenant, -len(taken))
            self._unwait(stream)
            self._send(stream, link)

    def _wait(self, stream: RoutedStream, timeout_s: float) -> None:
        self._queue.push(stream)
        stream.timer = asyncio.get_running_loop().call_later(timeout_s, self._expire, stream)

    def _unwait(self, stream: RoutedStream) -> None:
        self._queue.remove(stream)
        if stream.timer is not None:
            stream.timer.cancel()
            stream.timer = None

    def _expire(self, stream: RoutedStream) -> None:
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
        self._give_up(stream, error)

    def _look_after(self, base_model_id: BaseModelId) -> None:
        """Tells the owner of a base that requests wait for and no replica takes requests of, now and while it lasts."""
        if not self._queue.num_generations(base_model_id) or self._is_served(base_model_id):
            return
        if self._config.max_unserved_wait_s == 0:
            error = Unavailable(f"no replica serves {base_model_id} now", retry_after_s=2.0)
            for stream in self._queue.waiting(base_model_id):
                if not stream.resumed:
                    self._give_up(stream, error)
        elif self._on_unserved is not None and base_model_id not in self._reminders:
            loop = asyncio.get_running_loop()
            self._reminders[base_model_id] = loop.call_later(_REMIND_S, self._remind, base_model_id)
            self._on_unserved(base_model_id)

    def _remind(self, base_model_id: BaseModelId) -> None:
        del self._reminders[base_model_id]
        self._look_after(base_model_id)

    def _abort(self, stream: RoutedStream) -> None:
        self._unwait(stream)
        for link in (*self._links.values(), *self._leaving):
            taken = link.take_back(stream)
            if taken:
                self._queue.placed(stream.first.tenant, -len(taken))
                self._close_if_empty(link)

    def _give_up(self, stream: RoutedStream, error: LoraplexError) -> None:
        """None of its generations goes on, wherever it is."""
        self._abort(stream)
        stream.fail(error)

    def _close_if_empty(self, link: Link) -> None:
        if link.generations or link not in self._leaving:
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


def _place_of(route: ReplicaRoute) -> tuple[str, BaseModelId]:
    """What differs in this is another replica."""
    return route.address, route.base_model_id
