"""When a draining replica has nothing left: asks how much runs there. Knows no plan. Called by ``manager``."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping

from loraplex.controller.fleet.config import FleetConfig
from loraplex.core.ids import ReplicaId

logger = logging.getLogger(__name__)

Loads = Callable[[ReplicaId], Awaitable[int]]
"""Requests that run or wait on a replica. May raise whatever its carrier raises, or hang."""
_ASK_TIMEOUT_S = 2.0


class Drains:
    def __init__(self, config: FleetConfig, loads: Loads) -> None:
        self._config, self._loads = config, loads
        self._since_s: dict[ReplicaId, float] = {}
        self._quiet_since_s: dict[ReplicaId, float] = {}

    async def look(
        self, draining: Collection[ReplicaId], others: Iterable[ReplicaId], now_s: float
    ) -> Mapping[ReplicaId, int]:
        """Asks the draining ones and ``others``; returns what answered."""
        for gone in self._since_s.keys() - set(draining):
            self.forget([gone])
        for replica_id in draining:
            self._since_s.setdefault(replica_id, now_s)
        asked = [*draining, *others]
        answers = await asyncio.gather(*(self._ask(replica_id) for replica_id in asked))
        found = {replica_id: load for replica_id, load in zip(asked, answers, strict=True) if load is not None}
        for replica_id in draining:
            if found.get(replica_id) == 0:
                self._quiet_since_s.setdefault(replica_id, now_s)
            else:
                self._quiet_since_s.pop(replica_id, None)
        return found

    def drained(self, now_s: float) -> frozenset[ReplicaId]:
        """Quiet for long enough, or past their time."""
        return frozenset(
            replica_id
            for replica_id, since_s in self._since_s.items()
            if now_s - since_s >= self._config.drain_timeout_s
            or now_s - self._quiet_since_s.get(replica_id, now_s + 1) >= self._config.drain_quiet_s
        )

    def forget(self, replica_ids: Iterable[ReplicaId]) -> None:
        for replica_id in replica_ids:
            self._since_s.pop(replica_id, None)
            self._quiet_since_s.pop(replica_id, None)

    async def _ask(self, replica_id: ReplicaId) -> int | None:
        try:
            async with asyncio.timeout(_ASK_TIMEOUT_S):
                return await self._loads(replica_id)
        except Exception as error:  # who does not answer is not known to be idle; the time limit ends the wait
            logger.debug("replica %s does not say what it runs: %s", replica_id, error)
            return None
