"""Routing policies of others, to compare with: what ``RouterConfig.policy`` can name beside our own.

All of them take the router's queue and credits as they are; only the choice among replicas differs. Called by ``pool``
and by the exact simulator.
"""

import random
from collections.abc import Sequence

from loraplex.router.config import RouterConfig
from loraplex.router.policy import Choice, Demand, ReplicaView, RoutingPolicy, choose_replica, predict, rendezvous


def routing_policy(config: RouterConfig) -> RoutingPolicy:
    """What ``config.policy`` names; one for each base, since it may remember."""
    if config.policy == "predicted-finish":
        return choose_replica
    if config.policy == "least-loaded":
        return least_loaded
    if config.policy == "consistent-hash":
        return consistent_hash
    return PowerOfTwoMultiplexed()


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
    """Ray Serve's: the less loaded of two drawn at random from the replicas that have the adapter; if there are none or
    these are full from those with the fewest adapters; if these are full from all."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)

    def __call__(self, views: Sequence[ReplicaView], demand: Demand, config: RouterConfig) -> Choice | None:
        digest = demand.digest
        fewest = min((len(view.resident) for view in views), default=0)
        for pool in (
            [view for view in views if digest is None or digest in view.resident or digest in view.sent],
            [view for view in views if len(view.resident) == fewest],
            views,
        ):
            drawn = self._random.sample(pool, min(2, len(pool)))
            takers = [view for view in drawn if view.credits > 0]
            if takers:
                return _choice(min(takers, key=lambda view: view.rows), demand)
        return None


def _choice(view: ReplicaView | None, demand: Demand) -> Choice | None:
    return None if view is None else Choice(view=view, first_s=predict(view, demand)[0])
