"""Which replica takes a request. Pure: values in, a choice out; the simulator runs it as well.

A replica that has the adapter goes first unless it is overloaded, then load, then affinity by rendezvous hashing
(Thaler and Ravishankar, 1998): alike replicas are told apart by a hash of (key, replica), so that equal prefixes meet
again, a cold adapter has one home, and a replica that comes or goes moves only its own share; weights divide the keys
in proportion (Schindelhauer and Schomaker, 2005). The bound on the load is that of consistent hashing with bounded
loads (Mirrokni et al., 2018).
"""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from math import log

from loraplex.core.ids import ReplicaId
from loraplex.core.request import EngineRequest

_PREFIX_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaView:
    """What the router knows of one replica at the moment of choice."""

    replica_id: ReplicaId
    resident: bool
    """It has the adapter on its accelerator; always True for plain base requests."""
    load: int
    """Requests running and waiting there."""
    credits: int
    """Requests that it will take now."""
    weight: float = 1.0
    """Greater than 0: its part among replicas that are alike, for this request's adapter."""


def prefix_key(request: EngineRequest) -> bytes:
    """Equal for requests that can share the KV of their first tokens."""
    digest = request.adapter.digest if request.adapter is not None else ""
    head = array("q", request.prompt_token_ids[:_PREFIX_TOKENS]).tobytes()
    return b"\0".join((request.cache_salt.encode(), digest.encode(), head))


def adapter_key(request: EngineRequest) -> bytes:
    """Equal for requests of one adapter; for plain base requests the prefix key."""
    return request.adapter.digest.encode() if request.adapter is not None else prefix_key(request)


def choose_replica(
    views: Sequence[ReplicaView], request: EngineRequest, *, load_slack: int, load_bound: float
) -> ReplicaId | None:
    """None when no replica has a credit."""
    takers = [view for view in views if view.credits > 0]
    if not takers:
        return None
    limit = load_bound * sum(view.load for view in views) / len(views) + load_slack
    resident = [view for view in takers if view.resident and view.load <= limit]
    pool = resident or takers
    key = prefix_key(request) if resident else adapter_key(request)
    least = min(view.load for view in pool)
    alike = [view for view in pool if view.load <= least + load_slack]
    return max(alike, key=lambda view: affinity(key, view.replica_id, view.weight)).replica_id


def affinity(key: bytes, replica_id: ReplicaId, weight: float = 1.0) -> float:
    """Greatest on the replica where ``key`` has its home: weight / -ln(u), u uniform in (0, 1) by (key, replica)."""
    digest = hashlib.blake2b(key, digest_size=8, key=replica_id.encode()[:64]).digest()
    # 52 bits and a half: a double holds them, so u is never 0 or 1.
    return weight / -log(((int.from_bytes(digest) >> 12) + 0.5) * 2.0**-52)
