"""Which replica takes a request. Pure: values in, a choice out; the exact simulator runs it, the fast one its twin.

The replica that is predicted to serve the request soonest takes it, ``prediction`` being the judge: what is queued and
running there, the prompt less what its pages hold already, and the load of the adapter where it is not resident. So an
adapter has as many homes as its load needs: another replica loads it once the wait at the homes exceeds the cost of
that, and as long as they are idle all its requests go to the first of them, while the others forget it. One request
waits for the load, all that follow use it: it counts the less, the more requests of the adapter are under way.

Replicas that are alike are told apart by rendezvous hashing (Thaler and Ravishankar, 1998) of (key, replica), so that
equal prefixes meet again, a cold adapter has one home, and a replica that comes or goes moves only its own share;
weights divide the keys in proportion (Schindelhauer and Schomaker, 2005).
"""

import hashlib
from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import inf, log

from loraplex.core.ids import Digest, ReplicaId
from loraplex.core.request import EngineRequest
from loraplex.router.config import RouterConfig
from loraplex.router.prediction import LOAD_SHARE, Rates, decode_step_s, first_token_s

_PREFIX_TOKENS = 64
_WORD = (1 << 64) - 1


@dataclass(slots=True, kw_only=True)
class ReplicaView:
    """What the router knows of one replica. One object as long as the replica is known, changed in place."""

    replica_id: ReplicaId
    rates: Rates
    key: int = field(init=False)
    """``hash64`` of the id."""
    credits: int = 0
    """Requests that it will take now."""
    rows: int = 0
    """Requests running and waiting there."""
    queued_tokens: float = 0.0
    """Prompt tokens that are to be computed there."""
    prompt_tokens: float = 0.0
    """Of all requests there."""
    room_tokens: float = inf
    """For which it has pages, free or reclaimable."""
    resident: Collection[Digest] = frozenset()
    """Adapters on its accelerator."""
    sent: Mapping[Digest, int] = field(default_factory=dict)
    """Requests that were sent there and have not ended, by adapter: it is resident, or soon."""
    absence_s: Callable[[Digest], float] = field(default=lambda digest: 0.0)
    """Seconds to make an adapter resident there that is not."""

    def __post_init__(self) -> None:
        self.key = hash64(self.replica_id.encode())

    def context_tokens(self, output_tokens: float) -> float:
        """Of all requests there, each half-way through ``output_tokens``."""
        return self.prompt_tokens + 0.5 * output_tokens * self.rows

    def decode_s(self, output_tokens: float) -> float:
        """A step of what is there."""
        rates = self.rates
        return decode_step_s(
            rates.step_s, rates.row_s, rates.context_token_s, self.rows, self.context_tokens(output_tokens)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """A request as the choice sees it."""

    key: int
    """Tells alike replicas apart: equal keys meet."""
    prompt_tokens: int
    """With those generated elsewhere."""
    output_tokens: float
    """That it and others are expected to generate."""
    digest: Digest | None = None
    """Of its adapter; None: the plain base, at home everywhere."""
    saved_tokens: Mapping[ReplicaId, int] = field(default_factory=dict)
    """Prompt tokens whose pages are expected there."""
    weights: Mapping[ReplicaId, float] | None = None
    """Greater than 0: the parts of replicas that are alike; None: equal ones."""

    def weight(self, view: ReplicaView) -> float:
        return 1.0 if self.weights is None else self.weights.get(view.replica_id, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    view: ReplicaView
    first_s: float
    """Predicted time to the first token."""


RoutingPolicy = Callable[[Sequence[ReplicaView], Demand, RouterConfig], Choice | None]
"""None when no replica that it would choose has a credit."""


def choose_replica(views: Sequence[ReplicaView], demand: Demand, config: RouterConfig) -> Choice | None:
    """None when no replica has a credit."""
    digest, pace_weight = demand.digest, config.decode_weight * demand.output_tokens
    homes: list[tuple[float, float, ReplicaView]] = []
    others: list[tuple[float, float, ReplicaView]] = []
    least_home = least_other = inf
    sharing = 1.0
    if digest is not None:
        for view in views:
            if digest in view.sent:
                sharing += LOAD_SHARE * view.sent[digest]
    for view in views:
        if view.credits <= 0:
            continue
        first_s, decode_s = predict(view, demand)
        score = first_s + pace_weight * decode_s
        if digest is None or digest in view.resident or digest in view.sent:
            homes.append((score, first_s, view))
            if score < least_home:
                least_home = score
        else:
            absence_s = view.absence_s(digest)
            score += absence_s / sharing
            others.append((score, first_s + absence_s, view))
            if score < least_other:
                least_other = score
    if not homes and not others:
        return None
    pool, least = (homes, least_home) if least_home <= least_other + config.alike_s else (others, least_other)
    alike = [entry for entry in pool if entry[0] <= least + config.alike_s]
    if len(alike) == 1:
        _, first_s, view = alike[0]
    else:
        _, first_s, view = max(alike, key=lambda entry: rendezvous(demand.key, entry[2].key, demand.weight(entry[2])))
    return Choice(view=view, first_s=first_s)


def predict(view: ReplicaView, demand: Demand) -> tuple[float, float]:
    """(seconds to the first token, seconds of each step after it), its adapter being there."""
    rates, rows, output = view.rates, view.rows, demand.output_tokens
    context = view.prompt_tokens + 0.5 * output * rows
    new_tokens = demand.prompt_tokens
    decode_s = decode_step_s(rates.step_s, rates.row_s, rates.context_token_s, rows + 1.0, context + new_tokens)
    if demand.saved_tokens:
        new_tokens = max(1, new_tokens - demand.saved_tokens.get(view.replica_id, 0))
    first_s = first_token_s(
        decode_s,
        rates.prefill_s,
        rates.token_s,
        rates.free_tokens,
        rates.max_step_tokens,
        rates.max_running,
        rows,
        view.queued_tokens,
        context,
        view.room_tokens,
        new_tokens,
        output,
    )
    return first_s, decode_s


def wait_in_queue_s(views: Sequence[ReplicaView], demand: Demand, num_ahead: int) -> float:
    """Predicted time to the first token while none of ``views`` has a credit: one goes whenever a request ends
    there, after ``num_ahead`` others. 0 without views."""
    if not views:
        return 0.0
    output = demand.output_tokens
    ends_per_s = sum(min(view.rows, view.rates.max_running) / (output * view.decode_s(output)) for view in views)
    soonest_s = min(predict(view, demand)[0] for view in views)
    return soonest_s + num_ahead / ends_per_s if ends_per_s > 0 else soonest_s


def prefix_key(request: EngineRequest) -> int:
    """Equal for requests that can share the KV of their first tokens."""
    digest = request.adapter.digest if request.adapter is not None else ""
    head = array("q", request.prompt_token_ids[:_PREFIX_TOKENS]).tobytes()
    return hash64(b"\0".join((request.cache_salt.encode(), digest.encode(), head)))


def affinity(key: bytes, replica_id: ReplicaId, weight: float = 1.0) -> float:
    """Greatest on the replica where ``key`` has its home."""
    return rendezvous(hash64(key), _replica_key(replica_id), weight)


def rendezvous(key: int, replica_key: int, weight: float = 1.0) -> float:
    """weight / -ln(u), u uniform in (0, 1) by the two keys, which have 64 bits (splitmix64; Steele et al., 2014)."""
    z = (key * 0x9E3779B97F4A7C15 + replica_key * 0xD1B54A32D192ED03) & _WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
    z ^= z >> 31
    # 52 bits and a half: a double holds them, so u is never 0 or 1.
    return weight / -log(((z >> 12) + 0.5) * 2.0**-52)


def hash64(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())


@lru_cache(maxsize=4096)
def _replica_key(replica_id: ReplicaId) -> int:
    return hash64(replica_id.encode())
