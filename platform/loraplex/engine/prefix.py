"""Names full KV pages by what computed them, so that equal prefixes share pages, and knows which are being computed.

A page's key is SHA-256 over the key of the page before it and its own tokens; the chain starts from the cache salt, the
base and the adapter's digest, so that KV is never shared across them. Knows nothing of scheduling; called by
``memory``. The idea of keying by a hash chain is vLLM's automatic prefix caching.
"""

import hashlib
from array import array

from loraplex.core.ids import BaseModelId
from loraplex.engine.pages import PagePool
from loraplex.engine.sequence import Sequence


class PrefixCache:
    def __init__(self, pool: PagePool, *, page_size: int, base_model_id: BaseModelId, enabled: bool) -> None:
        self._pool = pool
        self._page_size = page_size
        self._base_model_id = base_model_id
        self._enabled = enabled
        self._coming: dict[bytes, Sequence] = {}
        """Key of a page that a running request computes -> that request, the first of several."""

    def match(self, sequence: Sequence) -> tuple[int, ...]:
        """Pages that hold the longest known prefix, never all tokens: at least one is left to compute.

        Takes no reference; the answer holds until the pool changes.
        """
        if not self._enabled:
            return ()
        limit = self._num_sharable(sequence)
        self._extend_keys(sequence, limit)
        pages: list[int] = []
        for key in sequence.page_keys[:limit]:
            page = self._pool.find(key)
            if page is None:
                break
            pages.append(page)
        return tuple(pages)

    def awaited(self, sequence: Sequence) -> Sequence | None:
        """The running request that computes the next page which ``sequence`` lacks, so that waiting for it saves that
        page; None when there is none."""
        if not self._coming:
            return None
        key = sequence.awaited_key
        if key not in self._coming:
            found, limit = len(self.match(sequence)), self._num_sharable(sequence)
            key = sequence.awaited_key = sequence.page_keys[found] if found < limit else None
        return None if key is None else self._coming.get(key)

    def begin(self, sequence: Sequence) -> None:
        """It was admitted and computes what ``match`` did not find. Changes state."""
        if self._enabled:
            for key in sequence.page_keys[sequence.num_sealed : self._num_sharable(sequence)]:
                self._coming.setdefault(key, sequence)

    def end(self, sequence: Sequence) -> None:
        """It stopped running: nobody waits for its pages any more. Changes state."""
        for key in sequence.page_keys[sequence.num_sealed :]:
            self._arrived(key, sequence)

    def seal(self, sequence: Sequence) -> None:
        """Offers the pages that ``num_computed`` has filled. Changes the pool and ``num_sealed``."""
        full = sequence.num_computed // self._page_size
        if not self._enabled or full <= sequence.num_sealed:
            return
        self._extend_keys(sequence, full)
        for index in range(sequence.num_sealed, full):
            self._pool.seal(sequence.pages[index], sequence.page_keys[index])
            self._arrived(sequence.page_keys[index], sequence)
        sequence.num_sealed = full

    def validate(self, holders: list[Sequence]) -> None:
        """Raises AssertionError when a page counts as being computed by a request that holds no pages."""
        for key, sequence in self._coming.items():
            assert sequence in holders, "a page is awaited from a request that does not run"
            assert key in sequence.page_keys[sequence.num_sealed :], "a page is awaited that is there"

    def _num_sharable(self, sequence: Sequence) -> int:
        """Full pages of the known tokens, but for the last token, which is always computed."""
        return (len(sequence.token_ids) - 1) // self._page_size

    def _arrived(self, key: bytes, sequence: Sequence) -> None:
        if self._coming.get(key) is sequence:
            del self._coming[key]

    def _extend_keys(self, sequence: Sequence, count: int) -> None:
        keys, size = sequence.page_keys, self._page_size
        while len(keys) < count:
            start = len(keys) * size
            previous = keys[-1] if keys else self._root(sequence)
            tokens = array("q", sequence.token_ids[start : start + size]).tobytes()
            keys.append(hashlib.sha256(previous + tokens).digest())

    def _root(self, sequence: Sequence) -> bytes:
        parts = (sequence.request.cache_salt, self._base_model_id, sequence.adapter or "")
        return hashlib.sha256(b"".join(hashlib.sha256(part.encode()).digest() for part in parts)).digest()
