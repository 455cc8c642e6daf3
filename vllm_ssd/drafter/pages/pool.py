"""Reference-counted KV pages with a prefix cache."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

NO_PAGES = np.empty(0, np.int32)


class OutOfPages(RuntimeError):
    """Raised if more pages are requested than are free."""


class PagePool:
    """`num_pages` KV pages, each unused or owned by one or more holders.

    A page with one holder may be written by it; a page with more holders is read-only. The prefix cache is a holder
    too: it holds full pages by a digest of their content. A page held by the cache alone is *idle* and counts as free;
    the least recently used idle page is dropped first.

    Invariant: every page is either on the stack of unused pages and has no holder, or off it and has at least one.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_unused = num_pages
        self._unused = np.arange(num_pages - 1, -1, -1, dtype=np.int32)
        self._holders = np.zeros(num_pages, np.int32)
        self._is_cached = np.zeros(num_pages, bool)
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._idle: dict[int, None] = {}  # least recently used first

    @property
    def num_free(self) -> int:
        """Pages that are unused or idle."""
        return self.num_unused + len(self._idle)

    def allocate(self, num_pages: int) -> np.ndarray:
        """Pages `[num_pages]` int32 held once; raises `OutOfPages` and takes none if too few are free."""
        self.make_room(num_pages)
        self.num_unused -= num_pages
        pages = self._unused[self.num_unused : self.num_unused + num_pages].copy()
        self._holders[pages] = 1
        return pages

    def share(self, pages: np.ndarray) -> None:
        """Add a holder to each of `pages` `[n]` (distinct, owned)."""
        if (self._holders[pages] == 0).any():
            raise ValueError("a free page cannot be shared")
        self._holders[pages] += 1
        for page in pages[self._is_cached[pages]].tolist():
            self._idle.pop(page, None)

    def release(self, pages: np.ndarray) -> None:
        """Remove one holder from each of `pages` `[n]` (distinct, least useful first)."""
        holders = self._holders[pages] - 1
        if (holders < 0).any():
            raise ValueError("a free page cannot be released")
        self._holders[pages] = holders
        self._put_back(pages[holders == 0])
        for page in pages[(holders == 1) & self._is_cached[pages]].tolist():
            self._idle[page] = None

    def holders(self, pages: np.ndarray) -> np.ndarray:
        """Number of holders `[n]` int32 of each page."""
        return self._holders[pages]

    # ---- the prefix cache ------------------------------------------------------------------------------

    def cache(self, page: int, digest: bytes) -> bool:
        """Add an owned, final page to the cache; returns False if it or one with this digest is cached already."""
        if self._holders[page] == 0:
            raise ValueError("a free page cannot be cached")
        if self._is_cached[page] or digest in self._page_of:
            return False
        self._page_of[digest], self._digest_of[page] = page, digest
        self._is_cached[page] = True
        self._holders[page] += 1
        return True

    def find(self, digests: Iterable[bytes]) -> np.ndarray:
        """Pages `[n]` int32 of the longest prefix of `digests` that is cached."""
        pages = []
        for digest in digests:
            page = self._page_of.get(digest)
            if page is None:
                break
            pages.append(page)
        return np.array(pages, np.int32)

    def is_cached(self, pages: np.ndarray) -> np.ndarray:
        """Which of `pages` are cached, `[n]` bool."""
        return self._is_cached[pages]

    def make_room(self, num_pages: int) -> np.ndarray:
        """Drop idle pages until `num_pages` are unused; returns the dropped ones, `[n]` int32. Raises `OutOfPages`."""
        if num_pages > self.num_free:
            raise OutOfPages(f"{num_pages} pages wanted, {self.num_free} free")
        if num_pages <= self.num_unused:
            return NO_PAGES
        dropped = [page for page, _ in zip(self._idle, range(num_pages - self.num_unused))]
        for page in dropped:
            del self._idle[page], self._page_of[self._digest_of.pop(page)]
        pages = np.array(dropped, np.int32)
        self._is_cached[pages] = False
        self._holders[pages] = 0
        self._put_back(pages)
        return pages

    def _put_back(self, pages: np.ndarray) -> None:
        self._unused[self.num_unused : self.num_unused + len(pages)] = pages
        self.num_unused += len(pages)
