"""Owns every page id of the arena: reference counts, the free list, and pages kept for their content.

Knows neither requests nor adapters nor what a content key means. Called by ``memory``, ``prefix`` and ``adapters``.
"""

from collections import OrderedDict
from collections.abc import Iterable


class PagePool:
    """A page is free, used (one or more references), or cached (no reference, content kept under its key)."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._references = [0] * num_pages
        self._cached: OrderedDict[int, int] = OrderedDict()
        self._page_of_key: dict[bytes, int] = {}
        self._key_of_page: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def oldest_cached_stamp(self) -> int | None:
        """Stamp with which the least recently used cached page was released; None when nothing is cached."""
        return next(iter(self._cached.values()), None)

    def take(self, count: int) -> tuple[int, ...]:
        """``count`` free pages with one reference each. Changes state. The caller has checked ``num_free``."""
        assert count <= len(self._free), "took more pages than are free"
        pages = tuple(self._free.pop() for _ in range(count))
        for page in pages:
            self._references[page] = 1
        return pages

    def reclaim_oldest(self) -> None:
        """Turns the least recently used cached page into a free one; its content is forgotten. Changes state."""
        page, _ = self._cached.popitem(last=False)
        del self._page_of_key[self._key_of_page.pop(page)]
        self._free.append(page)

    def share(self, page: int) -> None:
        """One more reference to a used or cached page. Changes state."""
        if self._references[page] == 0:
            del self._cached[page]
        self._references[page] += 1

    def touch(self, page: int, *, stamp: int) -> None:
        """If it is cached it counts as used now. Changes state."""
        if page in self._cached:
            self._cached[page] = stamp
            self._cached.move_to_end(page)

    def release(self, pages: Iterable[int], *, stamp: int) -> None:
        """One reference less to each page. Pages that are left with none become cached when sealed, else free.

        Changes state. Of pages released together, those that come first are reclaimed first.
        """
        for page in pages:
            assert self._references[page] > 0, f"page {page} released without a reference"
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._key_of_page:
                    self._cached[page] = stamp
                else:
                    self._free.append(page)

    def seal(self, page: int, key: bytes) -> None:
        """Declares that the content of a used page is final and known by ``key``. Changes state.

        Nothing happens when another page already holds that content.
        """
        assert self._references[page] > 0, f"page {page} sealed without a reference"
        if key not in self._page_of_key and page not in self._key_of_page:
            self._page_of_key[key] = page
            self._key_of_page[page] = key

    def find(self, key: bytes) -> int | None:
        """The page whose sealed content has this key."""
        return self._page_of_key.get(key)

    def num_references(self, page: int) -> int:
        return self._references[page]

    def is_cached(self, page: int) -> bool:
        return page in self._cached

    def validate(self, references: dict[int, int]) -> None:
        """Raises AssertionError unless the owners' own count of ``references`` (page -> count) is exactly this one."""
        assert {p: n for p, n in enumerate(self._references) if n} == references, "reference counts differ"
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a page is free twice"
        used = set(references)
        assert len(free) + len(cached) + len(used) == self.num_pages, "a page leaked or has two states"
        assert free | cached | used == set(range(self.num_pages)), "a page has two states"
        assert cached <= set(self._key_of_page), "a cached page has no key"
        assert not free & set(self._key_of_page), "a free page has a key"
        assert {p: k for k, p in self._page_of_key.items()} == self._key_of_page, "keys and pages differ"
