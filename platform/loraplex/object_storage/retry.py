"""Calls of an object store that are tried again: with waits that double and are drawn at random, for a bounded time.

The waits follow "Exponential Backoff And Jitter" (AWS Architecture Blog, 2015), half fixed and half drawn.
"""

import logging
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

R = TypeVar("R")
_PERMANENT = re.compile(
    r"AWS Error (ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|INVALID_SIGNATURE|NO_SUCH_BUCKET|"
    r"NO_SUCH_KEY|RESOURCE_NOT_FOUND|INVALID_CLIENT_TOKEN_ID|MISSING_AUTHENTICATION_TOKEN|UNRECOGNIZED_CLIENT)\b"
)


def is_transient(error: OSError) -> bool:
    """Whether the store may answer later. Local file systems set ``errno``; theirs are never."""
    return error.errno is None and "AWS Error" in str(error) and _PERMANENT.search(str(error)) is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    total_s: float
    """No attempt begins later than that after the first."""
    first_s: float = 0.1
    """Longest wait after the first failure; each later one is twice as long ..."""
    max_s: float = 5.0
    """... up to this."""

    def call(
        self,
        attempt: Callable[[], R],
        *,
        sleep: Callable[[float], None] = time.sleep,
        now_s: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> R:
        """Blocks. Raises what ``attempt`` raised last: at once unless it is transient."""
        deadline_s = now_s() + self.total_s
        longest_s = self.first_s
        while True:
            try:
                return attempt()
            except OSError as error:
                wait_s = longest_s * (1 + draw()) / 2
                if not is_transient(error) or now_s() + wait_s > deadline_s:
                    raise
                logger.warning("the object store does not answer, trying again in %.2f s: %s", wait_s, error)
            sleep(wait_s)
            longest_s = min(2 * longest_s, self.max_s)


def read_pieces(filesystem: Any, path: str, piece_bytes: int, retry: Retry) -> Iterator[bytes]:
    """A ``pyarrow.fs`` file from its beginning, in order; after a failure it goes on where it was. OSError."""
    with retry.call(partial(filesystem.open_input_file, path)) as file:
        offset, size = 0, file.size()
        while offset < size:
            piece = bytes(retry.call(partial(file.read_at, piece_bytes, offset)))
            offset += len(piece)
            yield piece
