"""The replicas of one base, what runs on them, and what waits for them: places, moves and gives up requests.

Decisions are ``policy``'s and ``queue``'s, this carries them out on the links. Lives on the gateway's event loop; owned
by ``router``.
"""

import asyncio
import time
from collections.abc import Callable, Hashable
from math import inf

from loraplex.core.errors import LoraplexError, Overloaded, ReplicaLost, Unavailable
from loraplex.core.ids import BaseModelId, ReplicaId
from loraplex.core.request import EngineRequest, Priority
from loraplex.router.config import RouterConfig
from loraplex.router.link import Link
from loraplex.router.planned import PlannedHomes
from loraplex.router.policy import Choice, Demand, hash64, prefix_key, wait_in_queue_s
from loraplex.router.prediction import OutputLength
from loraplex.router.prefixes import PrefixMap
from loraplex.router.queue import Ticket, WaitingQueue
from loraplex.router.rebalance import INTERVAL_S, candidates, saved_s
from loraplex.router.rivals import routing_policy
from loraplex.router.stream import Generation, RoutedStream
from loraplex.tenancy.fairness import ServiceCounters

_REMIND_S = 1.0
_MAX_RETRY_AFTER_S = 30.0
_ASK_AGAIN_S = 0.1
"""After which who has refused a request may be sent it again, if no other has room. It may have credits all the time:
a full table of adapters refuses without."""


class Pool:
    """Implements ``link.LinkOwner``."""

    def __init__(
        self,
        base_model_id: BaseModelId,
        config: RouterConfig,
        *,
        on_unserved: Callable[[BaseModelId], None] | None,
        on_empty: Callable[[Link], None],
    ) -> None:
        """``on_unserved`` as of ``Router``; ``on_empty`` hears that nothing runs on a link that left the table."""
        self._base_model_id = base_model_id
        self._config = config
        self._policy = routing_policy(config)
        self._on_unserved = on_unserved
        self._on_empty = on_empty
        self._links: dict[ReplicaId, Link] = {}
        self._leaving: set[Link] = set()
        self._planned = PlannedHomes()
        self._length = OutputLength(config.expected_output_tokens)
        self._prefixes = PrefixMap(config.max_prefixes)
        self._counters = ServiceCounters()
        self._queue: WaitingQueue[RoutedStream] = WaitingQueue(self._counters)
        self._num_queued = 0
        self._reminder: asyncio.TimerHandle | None = None
        self._min_gain_s = config.rebalance_min_gain_s if config.policy == "predicted-finish" else None
        self._rebalance_at_s = 0.0

    @property
    def links(self) -> list[Link]:
        """Those that only end what they run among them."""
        return [*self._leaving, *self._links.values()]

    @property
    def num_queued(self) -> int:
        """Generations that wait here."""
        return self._num_queued

    def link(self, replica_id: ReplicaId) -> Link | None:
        return self._links.get(replica_id)

    def add(self, link: Link) -> None:
        self._links[link.route.replica_id] = link

    def drop(self, link: Link) -> None:
        """Its replica left the table: what runs there moves to others or ends there."""
        del self._links[link.route.replica_id]
        self._leaving.add(link)
        self._prefixes.forget(link.route.replica_id)
        self._drain(link, True)

    def routes_changed(self) -> None:
        """Links were added, dropped, or have other routes."""
        for link in self._links.values():
            self._drain(link, link.route.draining)
        self._planned.update(link.route for link in self._links.values())
        for stream in self._queue.items():
            self._queue.remove(stream)
            self._queue.push(stream, self._ticket(stream))
        self._pump()
        self._look_after()
        for link in tuple(self._leaving):
            self._close_if_empty(link)

    def dispatch(self, stream: RoutedStream) -> None:
        """Raises Overloaded when no replica can serve it in time, Unavailable when there is none and none is waited
        for."""
        served = self._is_served()
        wait_s = self._config.max_queue_wait_s if served else self._config.max_unserved_wait_s
        if wait_s == 0:
            raise Unavailable(f"no replica serves {self._base_model_id} now", retry_after_s=2.0)
        stream.due_s, patience_s = self._due(stream.first)
        demand = self._demand(stream)
        choice = self._choose(stream, demand)
        if served:
            first_s = self._wait_s(stream, demand) if choice is None else choice.first_s
            if first_s > patience_s:
                raise Overloaded(
                    f"no replica of {self._base_model_id} can serve this in time: the first token would come after "
                    f"{first_s:.1f} s",
                    retry_after_s=min(_MAX_RETRY_AFTER_S, max(1.0, first_s - patience_s)),
                )
        if choice is None:
            self._make_way(stream, demand)
        for _ in stream.generations:
            self._counters.enter(stream.first.tenant)
        if choice is not None:
            self._send(stream, choice)
        else:
            self._wait(stream, min(wait_s, patience_s) if served else wait_s)
            self._look_after()

    def abort(self, stream: RoutedStream) -> None:
        """Its unfinished generations stop, wherever they are."""
        self._unwait(stream)
        for link in self.links:
            for generation in link.take_back(stream):
                self._settle(generation)
            self._close_if_empty(link)
        for _ in stream.generations:
            self._counters.leave(stream.first.tenant)

    def close(self, error: LoraplexError) -> None:
        """Ends all streams with ``error``."""
        if self._reminder is not None:
            self._reminder.cancel()
        streams = dict.fromkeys(self._queue.items())
        streams.update({generation.stream: None for link in self.links for generation in link.generations.values()})
        for stream in streams:
            self._unwait(stream)
            stream.fail(error)
        self._links.clear()
        self._leaving.clear()

    def validate(self) -> None:
        """Raises AssertionError on a broken invariant."""
        self._queue.validate()
        waiting = [generation for stream in self._queue.items() for generation in stream.pending]
        assert len(waiting) == self._num_queued, "generations that wait are miscounted"
        active: dict[str, int] = {}
        for generation in (*waiting, *(g for link in self.links for g in link.generations.values())):
            active[generation.request.tenant] = active.get(generation.request.tenant, 0) + 1
        self._counters.validate(active)  # type: ignore[arg-type]

    def link_changed(self, link: Link) -> None:
        """For ``Link`` only."""
        self._close_if_empty(link)
        self._pump()
        self._rebalance()

    def link_lost(self, link: Link, generations: list[Generation]) -> None:
        """For ``Link`` only."""
        self._prefixes.forget(link.route.replica_id)
        for generation in generations:
            self._settle(generation)
        for stream in {generation.stream: None for generation in generations}:
            stream.num_losses += 1
            if stream.num_losses >= self._config.max_losses:
                error = ReplicaLost(f"{stream.num_losses} replicas in a row were lost while they ran this request")
                self._give_up(stream, error)
            else:
                stream.resumed, stream.refused_by = True, frozenset()
                self._wait(stream, self._config.resume_timeout_s)
        self._close_if_empty(link)
        self._pump()
        self._look_after()

    def generation_ended(self, generation: Generation) -> None:
        """For ``Link`` only."""
        self._settle(generation)
        self._counters.leave(generation.request.tenant)
        self._length.ended(len(generation.token_ids))

    def generation_refused(self, link: Link, generation: Generation) -> bool:
        """For ``Link`` only."""
        stream, now_s = generation.stream, asyncio.get_running_loop().time()
        if not stream.refused_by:
            stream.refused_until_s = now_s + self._config.max_queue_wait_s
        stream.refused_by |= {link.route.replica_id}
        stream.ask_again_s = now_s + _ASK_AGAIN_S
        if not any(other.route.replica_id not in stream.refused_by for other in self._takers(stream)):
            return False
        self._settle(generation)
        self._wait(stream, max(0.0, stream.refused_until_s - now_s))
        self._pump()
        return True

    def _pump(self) -> None:
        """Who waits and can go, goes: those of draining replicas, then those in the queue, in its order."""
        self._move_off_draining()
        refused: list[RoutedStream] = []
        while self._num_queued and (stream := self._queue.next(self._has_room)) is not None:
            choice = self._choose(stream, self._demand(stream))
            if choice is not None:
                self._unwait(stream)
                self._send(stream, choice)
            elif stream.refused_by:
                # Who has room has refused it, not those behind it.
                self._queue.remove(stream)
                refused.append(stream)
            else:
                break
        for stream in refused:
            self._queue.push(stream, self._ticket(stream))

    def _has_room(self, name: Hashable) -> bool:
        return any(link.view.credits > 0 for link in self._takers_of(name))

    def _choose(self, stream: RoutedStream, demand: Demand, *, but: Link | None = None) -> Choice | None:
        views = [link.view for link in self._takers(stream) if link is not but]
        if stream.refused_by:
            others = [view for view in views if view.replica_id not in stream.refused_by]
            choice = self._policy(others, demand, self._config)
            if choice is not None or asyncio.get_running_loop().time() < stream.ask_again_s:
                return choice
        return self._policy(views, demand, self._config)

    def _demand(self, stream: RoutedStream) -> Demand:
        request = stream.first
        digest = request.adapter.digest if request.adapter is not None else None
        weights = self._planned.weights(name) if (name := self._planned.name_of(request)) is not None else None
        return Demand(
            key=prefix_key(request) if digest is None or weights is not None else hash64(digest.encode()),
            prompt_tokens=next(iter(stream.generations.values())).num_tokens,
            output_tokens=self._length.expected,
            digest=digest,
            saved_tokens=self._prefixes.saved_tokens(stream.prefixes),
            weights=weights,
        )

    def _send(self, stream: RoutedStream, choice: Choice) -> None:
        """What runs nowhere goes to a replica; what it is predicted to take counts for its tenant."""
        link, pending, output = self._links[choice.view.replica_id], stream.pending, self._length.expected
        link.place(pending)
        self._prefixes.sent(stream.prefixes, link.route.replica_id)
        for generation in pending:
            generation.token_service_s = link.view.decode_s(output) / link.view.rows
            generation.prompt_service_s = link.view.rates.token_s * generation.placed_tokens
            tokens = min(output, generation.num_left)
            generation.expected_service_s = generation.prompt_service_s + tokens * generation.token_service_s
            request = generation.request
            self._counters.expect(request.tenant, generation.expected_service_s, weight=request.weight)

    def _settle(self, generation: Generation) -> None:
        """It left its replica: its tenant pays for the tokens that it got there instead of those predicted."""
        request, tokens = generation.request, generation.num_tokens - generation.placed_tokens
        service_s = generation.prompt_service_s + tokens * generation.token_service_s
        self._counters.expect(request.tenant, -generation.expected_service_s, weight=request.weight)
        self._counters.charge(request.tenant, service_s, weight=request.weight)

    def _takers(self, stream: RoutedStream) -> list[Link]:
        """Links to replicas that may run it, up or not."""
        return self._takers_of(self._planned.name_of(stream.first))

    def _takers_of(self, name: Hashable) -> list[Link]:
        """If none of those that the plan names takes requests, any may."""
        open_links = [link for link in self._links.values() if link.drain_since_s is None]
        if name is None:
            return open_links
        listed = self._planned.weights(name)  # type: ignore[arg-type]
        return [link for link in open_links if link.up and link.route.replica_id in listed] or open_links

    def _is_served(self) -> bool:
        return any(link.drain_since_s is None for link in self._links.values())

    def _due(self, request: EngineRequest) -> tuple[float, float]:
        """(event loop's time at which its first token is due, seconds from now after which nobody waits for it)."""
        slo_s = self._config.ttft_slo_s
        if request.deadline_s is not None:
            slo_s = max(0.0, request.deadline_s - time.time())
        if slo_s is None:
            return inf, inf
        patience_s = inf if request.priority is Priority.OFFLINE else slo_s * self._config.ttft_patience
        return asyncio.get_running_loop().time() + slo_s, patience_s

    def _wait_s(self, stream: RoutedStream, demand: Demand) -> float:
        """Predicted time to the first token while no replica has a credit."""
        views = [link.view for link in self._takers(stream) if link.up]
        return wait_in_queue_s(views, demand, self._queue.num_ahead(stream.first.tenant, stream.first.weight))

    def _make_way(self, stream: RoutedStream, demand: Demand) -> None:
        """A full queue takes from who has most in it. Raises Overloaded where that is the stream's own tenant."""
        error = Overloaded(
            f"{self._num_queued} requests wait for {self._base_model_id} already",
            retry_after_s=min(_MAX_RETRY_AFTER_S, max(1.0, self._wait_s(stream, demand))),
        )
        while self._num_queued + len(stream.generations) > self._config.max_queued_requests:
            victim = self._queue.makes_way(stream.first.tenant, stream.first.weight)
            if victim is None:
                raise error
            self._give_up(victim, error)

    def _drain(self, link: Link, draining: bool) -> None:
        if not draining:
            link.drain_since_s = None
        elif link.drain_since_s is None:
            loop = asyncio.get_running_loop()
            link.drain_since_s = loop.time()
            loop.call_later(self._config.drain_timeout_s, self._move_off_draining)

    def _move_off_draining(self) -> None:
        """What draining replicas run goes to others, as far as it is due and they have room."""
        now_s = asyncio.get_running_loop().time()
        for link in self.links:
            if link.drain_since_s is None or not link.generations:
                continue
            overdue = now_s >= link.drain_since_s + self._config.drain_timeout_s
            for stream in {generation.stream: None for generation in link.generations.values()}:
                left_s = self._tokens_left(stream) * link.view.decode_s(self._length.expected)
                is_due = overdue or left_s > self._config.drain_migrate_above_s
                if is_due and (choice := self._choose(stream, self._demand(stream))):
                    self._move(stream, link, choice)
            self._close_if_empty(link)

    def _tokens_left(self, stream: RoutedStream) -> float:
        return max(min(generation.num_left, self._length.expected) for generation in stream.generations.values())

    def _move(self, stream: RoutedStream, source: Link, choice: Choice) -> None:
        for generation in source.take_back(stream):
            self._settle(generation)
        self._unwait(stream)
        stream.refused_by = frozenset()
        self._send(stream, choice)

    def _rebalance(self) -> None:
        """Now and then, while nobody waits here: what would end much sooner on another replica goes there."""
        now_s, least_s = asyncio.get_running_loop().time(), self._min_gain_s
        if least_s is None or now_s < self._rebalance_at_s or self._num_queued or len(self._links) < 2:
            return
        self._rebalance_at_s = now_s + INTERVAL_S
        for link in [link for link in self._links.values() if link.drain_since_s is None and link.generations]:
            for found in candidates(link.generations, link.load.num_waiting):
                stream, demand = found.stream, self._demand(found.stream)
                choice, left = self._choose(stream, demand, but=link), self._tokens_left(stream)
                if choice and saved_s(link.view, choice, demand, tokens_left=left, waits=found.waits) > least_s:
                    stream.rebalanced = True
                    self._move(stream, link, choice)
                    break

    def _ticket(self, stream: RoutedStream) -> Ticket:
        request = stream.first
        return Ticket(
            tenant=request.tenant,
            order=stream.order,
            weight=request.weight,
            due_s=stream.due_s,
            resumed=stream.resumed,
            offline=request.priority is Priority.OFFLINE,
            only=self._planned.name_of(request),
        )

    def _wait(self, stream: RoutedStream, timeout_s: float) -> None:
        """Puts it into the queue, or anew where it is there already."""
        self._unwait(stream)
        self._queue.push(stream, self._ticket(stream))
        stream.num_waiting = len(stream.pending)
        self._num_queued += stream.num_waiting
        stream.timer = asyncio.get_running_loop().call_later(timeout_s, self._expire, stream)

    def _unwait(self, stream: RoutedStream) -> None:
        if self._queue.remove(stream):
            self._num_queued -= stream.num_waiting
            stream.num_waiting = 0
        if stream.timer is not None:
            stream.timer.cancel()
            stream.timer = None

    def _expire(self, stream: RoutedStream) -> None:
        error: LoraplexError
        if stream.resumed:
            error = ReplicaLost(f"the replica of {self._base_model_id} was lost and none could take over")
        elif any(link.up for link in self._links.values()):
            retry_after_s = min(_MAX_RETRY_AFTER_S, max(1.0, self._wait_s(stream, self._demand(stream))))
            error = Overloaded(f"no replica of {self._base_model_id} had room in time", retry_after_s=retry_after_s)
        else:
            error = Unavailable(f"no replica of {self._base_model_id} is up", retry_after_s=2.0)
        self._give_up(stream, error)

    def _give_up(self, stream: RoutedStream, error: LoraplexError) -> None:
        """None of its generations goes on, wherever it is."""
        self.abort(stream)
        stream.fail(error)

    def _look_after(self) -> None:
        """Tells the owner of the base that requests wait and no replica takes any, now and while it lasts."""
        if not self._num_queued or self._is_served():
            return
        if self._config.max_unserved_wait_s == 0:
            error = Unavailable(f"no replica serves {self._base_model_id} now", retry_after_s=2.0)
            for stream in self._queue.items():
                if not stream.resumed:
                    self._give_up(stream, error)
        elif self._on_unserved is not None and self._reminder is None:
            self._reminder = asyncio.get_running_loop().call_later(_REMIND_S, self._remind)
            self._on_unserved(self._base_model_id)

    def _remind(self) -> None:
        self._reminder = None
        self._look_after()

    def _close_if_empty(self, link: Link) -> None:
        if link in self._leaving and not link.generations:
            self._leaving.discard(link)
            self._on_empty(link)
