"""The router's record of one replica: its route, its load as last heard, and the generations that run there.

Turns the client's callbacks into calls of the router. Mutable, owned by ``router``.
"""

from typing import Protocol

from loraplex.core.control import ReplicaRoute
from loraplex.core.ids import Digest, RequestId
from loraplex.core.wire import LoadReport, ReplicaFrame
from loraplex.router.client import ReplicaClient
from loraplex.router.policy import ReplicaView
from loraplex.router.stream import Generation, RoutedStream


class LinkOwner(Protocol):
    def link_changed(self, link: "Link") -> None:
        """A frame came: it may be up now, its load is news, generations may have ended."""

    def generation_ended(self, generation: Generation) -> None:
        """It got its last output."""

    def link_lost(self, link: "Link", generations: list[Generation]) -> None:
        """Its stream broke; ``generations`` ran there and have not ended."""


class Link:
    """Implements ``client.ReplicaListener``."""

    def __init__(self, route: ReplicaRoute, owner: LinkOwner) -> None:
        self.route = route
        self.client: ReplicaClient | None = None
        self.generations: dict[RequestId, Generation] = {}
        self.load = LoadReport()
        self.up = False
        self.draining = False
        """Its route is gone: what runs there ends there, nothing new is sent."""
        self._owner = owner
        self._resident: frozenset[Digest] = frozenset()
        self._num_sent = 0
        """Requests sent on the stream that is up now."""
        self._num_received = 0
        """Those that the last report has counted."""

    def view(self, digest: Digest | None) -> ReplicaView:
        return ReplicaView(
            replica_id=self.route.replica_id,
            resident=digest is None or digest in self._resident,
            # The report may be older than what was sent since; what runs there by our own count is a lower bound.
            load=max(self.load.num_running + self.load.num_waiting, len(self.generations)),
            credits=self.load.credits - (self._num_sent - self._num_received),
        )

    def place(self, stream: RoutedStream) -> None:
        """Sends all unfinished generations of the stream."""
        assert self.client is not None, "the link has no client"
        self.generations.update(stream.generations)
        self._num_sent += len(stream.generations)
        stream.replica_id = self.route.replica_id
        self.client.send(tuple(g.resumed_request() for g in stream.generations.values()), ())

    def abort(self, stream: RoutedStream) -> int:
        """Ends the stream's generations here; returns how many there were."""
        request_ids = tuple(request_id for request_id in stream.generations if request_id in self.generations)
        for request_id in request_ids:
            del self.generations[request_id]
        if request_ids and self.client is not None:
            self.client.send((), request_ids)
        return len(request_ids)

    def on_frame(self, frame: ReplicaFrame) -> None:
        if frame.replica is not None:
            self.up = True
        if frame.load is not None:
            self.load = frame.load
            received = frame.load.num_received
            self._num_received = self._num_sent if received is None else received
            if frame.load.resident_adapters is not None:
                self._resident = frozenset(frame.load.resident_adapters)
        touched: dict[RoutedStream, None] = {}
        for output in frame.outputs:
            generation = self.generations.get(output.request_id)
            if generation is None:
                continue
            if output.finish_reason is not None:
                del self.generations[output.request_id]
                self._owner.generation_ended(generation)
            generation.stream.push(generation, output)
            touched[generation.stream] = None
        for stream in touched:
            stream.wake()
        self._owner.link_changed(self)

    def on_down(self, reason: str) -> None:
        self.up = False
        self.load = LoadReport()
        self._resident = frozenset()
        self._num_sent = self._num_received = 0
        lost, self.generations = list(self.generations.values()), {}
        self._owner.link_lost(self, lost)
