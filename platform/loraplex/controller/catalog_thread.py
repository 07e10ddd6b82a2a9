"""Runs catalog calls in the one database thread, so that the event loop never waits for a disk.

After each change the new view is handed to the event loop before the caller goes on: who made a change sees it in the
next snapshot, and views arrive in the order of the changes, also when a caller was cancelled meanwhile. While one
change waits to learn whether its commit happened, all other calls fail at once.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from sqlalchemy.orm import Session

from loraplex.controller.catalog import Catalog, CatalogView
from loraplex.controller.config import ControllerOptions
from loraplex.core.clock import Clock
from loraplex.core.errors import Unavailable

R = TypeVar("R")


class CatalogThread:
    """``open`` first; ``on_change`` is called in the event loop."""

    def __init__(self, options: ControllerOptions, clock: Clock, on_change: Callable[[CatalogView], None]) -> None:
        self._options = options
        self._clock = clock
        self._on_change = on_change
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="catalog")
        self._catalog: Catalog | None = None

    async def open(self) -> tuple[Catalog, CatalogView]:
        """The catalog is returned for its constants; its methods belong to ``read`` and ``change``. Raises BadConfig,
        StorageFull, Unavailable."""
        loop = asyncio.get_running_loop()
        self._catalog = await loop.run_in_executor(self._thread, Catalog, self._options, self._clock)
        return self._catalog, await self.read(lambda catalog: catalog.view())

    async def read(self, call: Callable[[Catalog], R]) -> R:
        """For calls that change nothing which a snapshot shows. Raises Unavailable while a commit is in doubt."""
        catalog = self._opened()
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, catalog)

    async def change(self, call: Callable[[Catalog], R]) -> R:
        """Once begun, the change happens (or fails) as a whole, whether or not the caller still waits. Raises
        Unavailable while a commit is in doubt."""
        catalog = self._opened()
        loop = asyncio.get_running_loop()

        def run() -> R:
            result = call(catalog)
            loop.call_soon_threadsafe(self._on_change, catalog.view())
            return result

        return await loop.run_in_executor(self._thread, run)

    async def read_session(self, call: Callable[[Session], R]) -> R:
        return await self.read(lambda catalog: catalog.read_session(call))

    async def write_session(self, call: Callable[[Session], R]) -> R:
        """Once begun, as ``change``."""
        return await self.read(lambda catalog: catalog.write_session(call))

    async def close(self) -> None:
        """After all calls that were made. Idempotent."""
        if self._catalog is not None:
            catalog, self._catalog = self._catalog, None
            catalog.give_up()
            await asyncio.get_running_loop().run_in_executor(self._thread, catalog.close)
        self._thread.shutdown(wait=False)

    def _opened(self) -> Catalog:
        assert self._catalog is not None, "the controller is not started"
        if self._catalog.in_doubt:
            raise Unavailable("the control database does not answer")
        return self._catalog
