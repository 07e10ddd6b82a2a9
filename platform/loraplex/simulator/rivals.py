"""Routing policies of others, to compare with in the exact simulator. Called by ``routing_study`` and tests.

All of them take the router's queue and credits as they are; only the choice among replicas differs.
"""

import random
from collections.abc import Sequence

from loraplex.router.config import RouterConfig
from loraplex.router.policy import Choice, Demand, ReplicaView, predict, rendezvous


def least_loaded(views: Sequence[ReplicaView], demand: Demand, config: RouterConfig) -> Choice | None:
    """The replica with the fewest requests."""
    takers = [view for view in views if view.credits > 0]
    return _choice(
        min(takers, key=lambda view: (view.rows, rendezvous(demand.key, view.key))) if takers else None, demand
    )


def consistent_hash(views: Sequence[ReplicaView], demand: Demand, config: RouterConfig) -> Choice | None:
    """The home of the adapter on the ring; the next one only while it takes nothing."""
    takers = [view for view in views if view.credits > 0]
    return _choice(max(takers, key=lambda view: rendezvous(demand.key, view.key)) if takers else None, demand)


class PowerOfTwoMultiplexed:
    """Ray Serve's: among the replicas that have the adapter, or else those with the fewest adapters, the less loaded of
    two drawn at random. A request waits for a place on these and goes to no other."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)

    def __call__(self, views: Sequence[ReplicaView], demand: Demand, config: RouterConfig) -> Choice | None:
        digest = demand.digest
        pool = [view for view in views if digest is None or digest in view.resident or digest in view.sent]
        if not pool:
            fewest = min(len(view.resident) for view in views)
            pool = [view for view in views if len(view.resident) == fewest]
        drawn = self._random.sample(pool, min(2, len(pool)))
        takers = [view for view in drawn if view.credits > 0]
        return _choice(min(takers, key=lambda view: view.rows) if takers else None, demand)


def _choice(view: ReplicaView | None, demand: Demand) -> Choice | None:
    return None if view is None else Choice(view=view, first_s=predict(view, demand)[0])
