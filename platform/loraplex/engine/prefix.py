"""Names full KV pages by what computed them, so that equal prefixes share pages.

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

    def match(self, sequence: Sequence) -> tuple[int, ...]:
        """Pages that hold the longest known prefix, never all tokens: at least one is left to compute.

        Takes no reference; the answer holds until the pool changes.
        """
        if not self._enabled:
            return ()
        limit = (len(sequence.token_ids) - 1) // self._page_size
        self._extend_keys(sequence, limit)
        pages: list[int] = []
        for key in sequence.page_keys[:limit]:
            page = self._pool.find(key)
            if page is None:
                break
            pages.append(page)
        return tuple(pages)

    def seal(self, sequence: Sequence) -> None:
        """Offers the pages that ``num_computed`` has filled. Changes the pool and ``num_sealed``."""
        full = sequence.num_computed // self._page_size
        if not self._enabled or full <= sequence.num_sealed:
            return
        self._extend_keys(sequence, full)
        for index in range(sequence.num_sealed, full):
            self._pool.seal(sequence.pages[index], sequence.page_keys[index])
        sequence.num_sealed = full

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
