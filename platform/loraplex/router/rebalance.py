"""Which requests that are on a replica already should go to another one: there they would end much sooner. Pure.

A replica that has just come finds others with requests that wait there, or that share a step with many; so does one
whose own have ended, or a faster one. Of each replica two requests are looked at: the one that came last of those that
have no token yet, while some wait there (it is behind all others), and the one with most tokens left. To go costs the
prompt and the tokens so far once more, and the adapter's load: that is in the prediction of the new place. ``pool``
carries the moves out; a request moves so once in its life, and each look moves one request of a replica at most, since
what a move changes is known with the next report.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from loraplex.core.ids import RequestId
from loraplex.router.policy import Choice, Demand, ReplicaView, predict
from loraplex.router.prediction import first_token_s
from loraplex.router.stream import Generation, RoutedStream

INTERVAL_S = 0.25
"""Between two looks of a router at the replicas of a base."""
_SHARE = 0.3
"""Of the time that it would take where it is, that a request must save at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    stream: RoutedStream
    waits: bool
    """It has got no token there, and others wait there too."""


def candidates(generations: Mapping[RequestId, Generation], num_waiting: int) -> Iterator[Candidate]:
    """``generations`` of one replica, in the order in which they were sent there; ``num_waiting``: requests, of
    whomever, that wait there for their turn."""
    movable = [generation for generation in generations.values() if not generation.stream.rebalanced]
    if num_waiting:
        waiting = [generation for generation in movable if generation.num_tokens == generation.placed_tokens]
        if waiting:
            yield Candidate(stream=waiting[-1].stream, waits=True)
    running = [generation for generation in movable if generation.num_tokens > generation.placed_tokens]
    if running:
        yield Candidate(stream=max(running, key=lambda generation: generation.num_left).stream, waits=False)


def saved_s(here: ReplicaView, there: Choice, demand: Demand, *, tokens_left: float, waits: bool) -> float:
    """Seconds that a request ends sooner on the replica of ``there``, which was chosen for it; 0 where that is not a
    good part of what it would take ``here``, where it is now."""
    here_s = tokens_left * here.decode_s(demand.output_tokens)
    if waits:
        here_s += _first_token_s(here, demand)
    _, decode_s = predict(there.view, demand)
    there_s = there.first_s + tokens_left * decode_s
    return here_s - there_s if there_s <= (1 - _SHARE) * here_s else 0.0


def _first_token_s(view: ReplicaView, demand: Demand) -> float:
    """Of the last of the requests there, which ``view`` counts among them."""
    rates, output = view.rates, demand.output_tokens
    return first_token_s(
        view.decode_s(output),
        rates.prefill_s,
        rates.token_s,
        rates.free_tokens,
        rates.max_step_tokens,
        rates.max_running,
        max(0.0, view.rows - 1.0),
        max(0.0, view.queued_tokens - demand.prompt_tokens),
        view.context_tokens(output),
        view.room_tokens,
        demand.prompt_tokens,
        output,
    )
