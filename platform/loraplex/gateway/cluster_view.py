"""The newest control snapshot that this gateway knows, and waiting for a newer one. No I/O: ``Gateway`` feeds it."""

import asyncio
from collections.abc import Callable

from loraplex.core.control import ControlSnapshot
from loraplex.core.errors import Unavailable
from loraplex.gateway.directory import Directory


class ClusterView:
    """One writer (the snapshot loop), many readers, all on one event loop."""

    def __init__(self) -> None:
        self._directory: Directory | None = None
        self._changed = asyncio.Event()

    @property
    def directory(self) -> Directory:
        """Raises Unavailable until the first snapshot is in."""
        if self._directory is None:
            raise Unavailable("The gateway is starting: it has no snapshot of the cluster yet.")
        return self._directory

    @property
    def snapshot(self) -> ControlSnapshot | None:
        return None if self._directory is None else self._directory.snapshot

    def apply(self, snapshot: ControlSnapshot) -> bool:
        """Takes ``snapshot`` when it is newer than the one held. False, changing nothing, for an
        older epoch or version."""
        held = self.snapshot
        if held is not None and (snapshot.epoch, snapshot.version) <= (held.epoch, held.version):
            return False
        self._directory = Directory(snapshot)
        self.notify()
        return True

    def notify(self) -> None:
        """Lets those who wait look again, also when something beside the snapshot changed."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_for(self, seen: Callable[[Directory], bool], *, timeout_s: float | None) -> bool:
        """Waits until ``seen`` holds of the snapshot; False when it still does not after ``timeout_s``.
        None: for ever."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._directory is None or not seen(self._directory):
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True
