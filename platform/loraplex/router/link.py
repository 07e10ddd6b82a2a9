"""The router's record of one replica: its route, what is known of its load, and the generations that run there.

Turns the client's callbacks into calls of the router. Mutable, owned by ``router``.
"""

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import replace
from math import inf
from typing import Protocol

from loraplex.core.control import ReplicaRoute
from loraplex.core.errors import Overloaded
from loraplex.core.ids import Digest, RequestId
from loraplex.core.request import RequestOutput
from loraplex.core.wire import LoadReport, ReplicaFrame, ReplicaInfo
from loraplex.router.client import ReplicaClient
from loraplex.router.policy import ReplicaView
from loraplex.router.rates import RateBook
from loraplex.router.stream import Generation, RoutedStream

_UNKNOWN_TOKENS = 256.0
"""Of another gateway's request."""


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

    def __init__(self, route: ReplicaRoute, owner: LinkOwner, rates: RateBook) -> None:
        self.route = route
        self.client: ReplicaClient | None = None
        self.generations: dict[RequestId, Generation] = {}
        """By their ids on the wire."""
        self.load = LoadReport()
        self.up = False
        self.drain_since_s: float | None = None
        """Event loop's time from which on nothing new is sent: its route says so, or is gone."""
        self.view = ReplicaView(replica_id=route.replica_id, rates=rates.rates(route, None))
        self._owner = owner
        self._rates = rates
        self._info: ReplicaInfo | None = None
        self._resident: frozenset[Digest] = frozenset()
        self._hosted: set[Digest] = set()
        self._sent_adapters: Counter[Digest] = Counter()
        self.view.sent = self._sent_adapters
        self.view.absence_s = self._absence_s
        self._load_s, self._fetch_s = rates.load_s(route)
        self._placed_tokens = 0
        """Of all ``generations`` together."""
        self._has_reported = False
        """On the stream that is up now."""
        self._num_sent = 0
        """Requests sent on the stream that is up now."""
        self._num_received = 0
        """Those that the last report has counted."""
        self._unreceived: deque[int] = deque()
        """Tokens of each of the others, in the order in which they were sent."""
        self._unreceived_tokens = 0

    @property
    def report(self) -> LoadReport:
        """The last one, with the adapters that the last one to tell of them named."""
        return replace(self.load, resident_adapters=tuple(sorted(self._resident)))

    def change_route(self, route: ReplicaRoute) -> None:
        """Another route of the same replica."""
        self.route = route
        self._tell_rates()

    def place(self, generations: Iterable[Generation]) -> None:
        """Sends generations of one stream that run nowhere."""
        assert self.client is not None, "the link has no client"
        requests = []
        for generation in generations:
            assert generation.replica_id is None, "a generation was to run twice"
            generation.replica_id = generation.stream.replica_id = self.route.replica_id
            self._enter(generation)
            requests.append(generation.resumed_request())
            generation.stream.span.event("sent", replica=self.route.replica_id)
        self._refresh()
        self.client.send(tuple(requests), ())

    def take_back(self, stream: RoutedStream) -> list[Generation]:
        """Ends the stream's generations here; they run nowhere from now on."""
        taken = [g for g in stream.generations.values() if g.wire_id in self.generations]
        if not taken:
            return taken
        for generation in taken:
            self._leave(generation)
        if self.client is not None:
            self.client.send((), tuple(generation.wire_id for generation in taken))
        for generation in taken:
            generation.left_alive()
            generation.stream.span.event("taken back", replica=self.route.replica_id)
        self._refresh()
        return taken

    def on_frame(self, frame: ReplicaFrame) -> None:
        if frame.replica is not None:
            self.up, self._info = True, frame.replica
            self._tell_rates()
        if frame.load is not None:
            self._take_report(frame.load)
        touched: dict[RoutedStream, None] = {}
        for output in frame.outputs:
            generation = self.generations.get(output.request_id)
            if generation is None:
                continue
            if output.finish_reason is not None:
                self._leave(generation)
                if _is_refusal(output) and self._owner.generation_refused(self, generation):
                    continue
            generation.stream.push(generation, output)
            if output.finish_reason is not None:
                self._owner.generation_ended(generation)
            touched[generation.stream] = None
        for stream in touched:
            stream.wake()
        self._refresh()
        self._owner.link_changed(self)

    def on_down(self, reason: str) -> None:
        self.up = self._has_reported = False
        self.load = LoadReport()
        self._resident = self.view.resident = frozenset()
        self._hosted.clear()
        self._num_sent = self._num_received = self._unreceived_tokens = 0
        self._unreceived.clear()
        lost = list(self.generations.values())
        for generation in lost:
            self._leave(generation)
            generation.stream.span.event("replica lost", replica=self.route.replica_id)
        self._refresh()
        self._owner.link_lost(self, lost)

    def _enter(self, generation: Generation) -> None:
        self.generations[generation.wire_id] = generation
        tokens = generation.placed_tokens = generation.num_tokens
        self._placed_tokens += tokens
        self._num_sent += 1
        self._unreceived.append(tokens)
        self._unreceived_tokens += tokens
        if (adapter := generation.request.adapter) is not None:
            self._sent_adapters[adapter.digest] += 1
            self._hosted.add(adapter.digest)

    def _leave(self, generation: Generation) -> None:
        del self.generations[generation.wire_id]
        generation.replica_id = None
        self._placed_tokens -= generation.placed_tokens
        if (adapter := generation.request.adapter) is not None:
            self._sent_adapters[adapter.digest] -= 1
            if not self._sent_adapters[adapter.digest]:
                del self._sent_adapters[adapter.digest]

    def _take_report(self, report: LoadReport) -> None:
        # The first report of a stream counts since the replica's start, with all that passed while no stream was up.
        if self._has_reported and self._rates.observe(self.route, self.load, report):
            self._tell_rates()
        self._has_reported = True
        self.load = report
        self._num_received = self._num_sent if report.num_received is None else report.num_received
        while self._num_received + len(self._unreceived) > self._num_sent:
            self._unreceived_tokens -= self._unreceived.popleft()
        if report.resident_adapters is not None:
            self._resident = self.view.resident = frozenset(report.resident_adapters)
            self._hosted |= self._resident

    def _absence_s(self, digest: Digest) -> float:
        """Until an adapter that is not resident would be. What was ever there is taken to be in host memory."""
        return self._load_s if digest in self._hosted else self._load_s + self._fetch_s

    def _tell_rates(self) -> None:
        self.view.rates = self._rates.rates(self.route, self._info)
        self._load_s, self._fetch_s = self._rates.load_s(self.route)

    def _refresh(self) -> None:
        """What others sent there is in the report alone, what we sent since in our own count alone."""
        view, load, own = self.view, self.load, len(self.generations)
        num_unreceived = self._num_sent - self._num_received
        view.credits = load.credits - num_unreceived if self.up else 0
        view.rows = max(load.num_running + load.num_waiting + num_unreceived, own)
        view.queued_tokens = load.num_queued_tokens + self._unreceived_tokens
        mean_tokens = self._placed_tokens / own if own else _UNKNOWN_TOKENS
        view.prompt_tokens = self._placed_tokens + (view.rows - own) * mean_tokens
        view.room_tokens = load.num_free_pages * self._info.page_size if self._info is not None else inf


def _is_refusal(output: RequestOutput) -> bool:
    return output.error_code == Overloaded.code and not output.tokens
