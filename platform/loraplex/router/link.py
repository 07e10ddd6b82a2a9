"""The router's record of one replica: its route, its load as last heard, and the generations that run there.

Turns the client's callbacks into calls of the router. Mutable, owned by ``router``.
"""

from collections.abc import Iterable
from typing import Protocol

from loraplex.core.control import ReplicaRoute
from loraplex.core.errors import Overloaded
from loraplex.core.ids import Digest, RequestId
from loraplex.core.request import RequestOutput
from loraplex.core.wire import LoadReport, ReplicaFrame
from loraplex.router.client import ReplicaClient
from loraplex.router.policy import ReplicaView
from loraplex.router.stream import Generation, RoutedStream


class LinkOwner(Protocol):
    def link_changed(self, link: "Link") -> None:
        """A frame came: it may be up now, its load is news, generations may have ended."""

    def generation_ended(self, generation: Generation) -> None:
        """It got its last output."""

    def generation_refused(self, link: "Link", generation: Generation) -> bool:
        """The replica had no room for it. False: no other could have, the caller shall hear of it."""

    def link_lost(self, link: "Link", generations: list[Generation]) -> None:
        """Its stream broke; ``generations`` ran there and have not ended."""


class Link:
    """Implements ``client.ReplicaListener``."""

    def __init__(self, route: ReplicaRoute, owner: LinkOwner) -> None:
        self.route = route
        self.client: ReplicaClient | None = None
        self.generations: dict[RequestId, Generation] = {}
        """By their ids on the wire."""
        self.load = LoadReport()
        self.up = False
        self.drain_since_s: float | None = None
        """Event loop's time from which on nothing new is sent: its route says so, or is gone."""
        self._owner = owner
        self._resident: frozenset[Digest] = frozenset()
        self._num_sent = 0
        """Requests sent on the stream that is up now."""
        self._num_received = 0
        """Those that the last report has counted."""

    @property
    def step_s(self) -> float:
        """Seconds of a step, by what it has told; 0 while it has told nothing."""
        return self.load.busy_s / self.load.steps if self.load.steps else 0.0

    def view(self, digest: Digest | None) -> ReplicaView:
        return ReplicaView(
            replica_id=self.route.replica_id,
            resident=digest is None or digest in self._resident,
            # The report may be older than what was sent since; what runs there by our own count is a lower bound.
            load=max(self.load.num_running + self.load.num_waiting, len(self.generations)),
            credits=self.load.credits - (self._num_sent - self._num_received),
        )

    def place(self, generations: Iterable[Generation]) -> None:
        """Sends generations of one stream that run nowhere."""
        assert self.client is not None, "the link has no client"
        requests = []
        for generation in generations:
            assert generation.replica_id is None, "a generation was to run twice"
            generation.replica_id = generation.stream.replica_id = self.route.replica_id
            self.generations[generation.wire_id] = generation
            requests.append(generation.resumed_request())
        self._num_sent += len(requests)
        self.client.send(tuple(requests), ())

    def take_back(self, stream: RoutedStream) -> list[Generation]:
        """Ends the stream's generations here; they run nowhere from now on."""
        taken = [g for g in stream.generations.values() if g.wire_id in self.generations]
        for generation in taken:
            del self.generations[generation.wire_id]
        if taken and self.client is not None:
            self.client.send((), tuple(generation.wire_id for generation in taken))
        for generation in taken:
            generation.replica_id = None
            generation.left_alive()
        return taken

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
                generation.replica_id = None
                if _is_refusal(output) and self._owner.generation_refused(self, generation):
                    continue
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
        for generation in lost:
            generation.replica_id = None
        self._owner.link_lost(self, lost)


def _is_refusal(output: RequestOutput) -> bool:
    return output.error_code == Overloaded.code and not output.tokens
