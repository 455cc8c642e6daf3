"""Reference-counted KV pages."""

from __future__ import annotations

import numpy as np


class OutOfPages(RuntimeError):
    """More pages were asked for than are free."""


class PagePool:
    """`num_pages` KV pages, each free or owned by one or more holders.

    A page held once may be written by its holder; a page held more than once is read-only.
    Invariant: every page is either on the free stack with no holder, or off it with at least one.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_free = num_pages
        self._free = np.arange(num_pages - 1, -1, -1, dtype=np.int32)
        self._holders = np.zeros(num_pages, np.int32)

    def allocate(self, num_pages: int) -> np.ndarray:
        """Pages `[num_pages]` int32 held once; raises `OutOfPages` and takes none if too few are free."""
        if num_pages > self.num_free:
            raise OutOfPages(f"{num_pages} pages wanted, {self.num_free} free")
        self.num_free -= num_pages
        pages = self._free[self.num_free : self.num_free + num_pages].copy()
        self._holders[pages] = 1
        return pages

    def share(self, pages: np.ndarray) -> None:
        """Add a holder to each of `pages` `[n]` (distinct, owned)."""
        if (self._holders[pages] == 0).any():
            raise ValueError("a free page cannot be shared")
        self._holders[pages] += 1

    def release(self, pages: np.ndarray) -> None:
        """Remove one holder from each of `pages` `[n]` (distinct); pages without holders become free."""
        holders = self._holders[pages] - 1
        if (holders < 0).any():
            raise ValueError("a free page cannot be released")
        self._holders[pages] = holders
        freed = pages[holders == 0]
        self._free[self.num_free : self.num_free + len(freed)] = freed
        self.num_free += len(freed)

    def holders(self, pages: np.ndarray) -> np.ndarray:
        """Number of holders `[n]` int32 of each page."""
        return self._holders[pages]
