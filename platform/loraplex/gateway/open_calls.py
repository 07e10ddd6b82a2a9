"""How many calls one gateway has open, over HTTP and gRPC together, and the refusal of more. One event loop."""

from collections.abc import Iterator
from contextlib import contextmanager

from loraplex.core.errors import Overloaded

_RETRY_AFTER_S = 1.0


class OpenCalls:
    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._count = 0

    @contextmanager
    def one_more(self) -> Iterator[None]:
        """Holds a place. Raises Overloaded when there is none."""
        if self._count >= self._limit:
            raise Overloaded(
                f"{self._count} calls are open at this gateway, as many as it takes.", retry_after_s=_RETRY_AFTER_S
            )
        self._count += 1
        try:
            yield
        finally:
            self._count -= 1
