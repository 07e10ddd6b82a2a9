"""The adapters that the plan puts on a replica: who of them is still on the way to the accelerator.

Lives on the engine's thread, owned by ``engine_loop``; ``done`` is for whoever asked, on any thread.
"""

from concurrent.futures import Future

from loraplex.core.ids import Digest
from loraplex.engine import Engine


class Warming:
    def __init__(self, digests: tuple[Digest, ...]) -> None:
        self.digests = tuple(dict.fromkeys(digests))
        self.done: Future[None] = Future()
        self._wanted = frozenset(self.digests)
        self._missing = set(self.digests)
        self._end_if_complete()

    def staged(self, digest: Digest, engine: Engine) -> None:
        """It lies in host memory: loads it if it is wanted and there is room, which is not asked for twice."""
        if digest in self._missing:
            engine.warm(digest, self._wanted)
            self.failed(digest)

    def failed(self, digest: Digest) -> None:
        """It will not come; the requests that ask for it are told why."""
        self._missing.discard(digest)
        self._end_if_complete()

    def end(self) -> None:
        """Idempotent."""
        self._missing.clear()
        self._end_if_complete()

    def _end_if_complete(self) -> None:
        # The caller may have cancelled it.
        if not self._missing and not self.done.done() and self.done.set_running_or_notify_cancel():
            self.done.set_result(None)
