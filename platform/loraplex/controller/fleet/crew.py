"""One task per replica that talks to the actuator for as long as it takes: start, watch, assign, stop.

Decides nothing: what came of it goes to ``tell`` as an event, on the event loop. Called by ``manager`` and ``events``.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from loraplex.core.control import ReplicaRoute
from loraplex.core.errors import LoraplexError, Unavailable
from loraplex.core.fleet import Actuator, ReplicaTarget
from loraplex.core.ids import ReplicaId

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ready:
    replica_id: ReplicaId
    route: ReplicaRoute


@dataclass(frozen=True, slots=True)
class Down:
    """It died, or could not start."""

    replica_id: ReplicaId
    reason: str


@dataclass(frozen=True, slots=True)
class Stopped:
    """Its GPUs are free."""

    replica_id: ReplicaId


@dataclass(frozen=True, slots=True)
class Assigned:
    target: ReplicaTarget


@dataclass(frozen=True, slots=True)
class AssignFailed:
    target: ReplicaTarget
    reason: str


@dataclass(frozen=True, slots=True)
class Superseded:
    """The machines take commands of a later controller."""


Event = Ready | Down | Stopped | Assigned | AssignFailed | Superseded


class Crew:
    def __init__(self, actuator: Actuator, *, epoch: int, retry_s: float, tell: Callable[[Event], None]) -> None:
        """``retry_s``: between attempts of what must succeed in the end (watching, stopping)."""
        self._actuator, self._epoch, self._retry_s, self._tell = actuator, epoch, retry_s, tell
        self._lives: dict[ReplicaId, asyncio.Task[None]] = {}
        self._assigns: dict[ReplicaId, asyncio.Task[None]] = {}

    def start(self, target: ReplicaTarget) -> None:
        """Starts or adopts it, then watches."""
        self._begin(target.replica_id, self._start(target))

    def watch(self, replica_id: ReplicaId) -> None:
        self._begin(replica_id, self._watch(replica_id))

    def stop(self, replica_id: ReplicaId) -> None:
        """Whatever is under way with it ends."""
        self._cancel_assign(replica_id)
        self._begin(replica_id, self._stop(replica_id))

    def assign(self, target: ReplicaTarget) -> None:
        self._cancel_assign(target.replica_id)
        self._assigns[target.replica_id] = asyncio.create_task(self._guarded(self._assign(target)))

    def assigning(self, replica_id: ReplicaId) -> bool:
        task = self._assigns.get(replica_id)
        return task is not None and not task.done()

    def forget(self, replica_id: ReplicaId) -> None:
        """Of a replica that is stopped."""
        self._lives.pop(replica_id, None)
        self._assigns.pop(replica_id, None)

    async def close(self) -> None:
        """Replicas stay as they are."""
        tasks = [*self._lives.values(), *self._assigns.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, replica_id: ReplicaId, work: Coroutine[Any, Any, None]) -> None:
        before = self._lives.get(replica_id)
        if before is not None:
            before.cancel()
        self._lives[replica_id] = asyncio.create_task(self._guarded(work))

    def _cancel_assign(self, replica_id: ReplicaId) -> None:
        task = self._assigns.pop(replica_id, None)
        if task is not None:
            task.cancel()

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Unavailable as error:
            if error.code != "superseded":
                raise
            self._tell(Superseded())

    async def _start(self, target: ReplicaTarget) -> None:
        try:
            route = await self._actuator.start(target, epoch=self._epoch)
        except Exception as error:  # whatever the machines raise, the replica is not there
            self._tell(Down(target.replica_id, _said(error)))
            return
        self._tell(Ready(target.replica_id, route))
        await self._watch(target.replica_id)

    async def _watch(self, replica_id: ReplicaId) -> None:
        while True:
            try:
                reason = await self._actuator.wait_stopped(replica_id)
            except Exception as error:  # not knowing is no reason to take it for dead
                logger.warning("replica %s cannot be watched, trying again: %s", replica_id, _said(error))
                await asyncio.sleep(self._retry_s)
                continue
            self._tell(Down(replica_id, reason))
            return

    async def _assign(self, target: ReplicaTarget) -> None:
        try:
            await self._actuator.assign(target, epoch=self._epoch)
        except Exception as error:  # as above: what was not assigned is loaded on demand
            self._tell(AssignFailed(target, _said(error)))
            return
        self._tell(Assigned(target))

    async def _stop(self, replica_id: ReplicaId) -> None:
        while True:
            try:
                await self._actuator.stop(replica_id, epoch=self._epoch)
            except Exception as error:  # its GPUs are free when it says so, not before
                logger.warning("replica %s cannot be stopped, trying again: %s", replica_id, _said(error))
                await asyncio.sleep(self._retry_s)
                continue
            self._tell(Stopped(replica_id))
            return


def _said(error: Exception) -> str:
    """One line. A superseded controller hears of it whatever it asked."""
    if isinstance(error, Unavailable) and error.code == "superseded":
        raise error
    text = error.message if isinstance(error, LoraplexError) else str(error)
    return (text.strip() or type(error).__name__).splitlines()[-1]
