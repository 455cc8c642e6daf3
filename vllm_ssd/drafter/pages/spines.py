"""Page accounting of spines, common to host and device pages."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

import numpy as np

from vllm_ssd.compat.drafter.paged import PagedModel
from vllm_ssd.drafter.pages.pool import PagePool


class SpinePages:
    """The pages of the spines in `max_num_seqs` slots; `HostPages` and `DevicePages` add those of the branches.

    tables [S, W] int32, num_pages [S] int64: the pages of each spine, from `pool`. Full pages of committed tokens are
    cached by their content, and shared by all spines with that prefix.
    """

    def __init__(self, model: PagedModel, max_num_seqs: int) -> None:
        self._model = model
        self.page_size = model.page_size
        self.capacity = model.num_pages
        self.pool = PagePool(model.num_pages)
        self.tables = np.zeros((max_num_seqs, model.max_model_len // model.page_size + 3), np.int32)
        self.num_pages = np.zeros(max_num_seqs, np.int64)

    def missing(self, slot: int, num_tokens: int) -> int:
        """See `Pages.missing`."""
        return max(-(-num_tokens // self.page_size) - int(self.num_pages[slot]), 0)

    def reserve(self, slot: int, num_tokens: int) -> None:
        """See `Pages.reserve`."""
        have, missing = int(self.num_pages[slot]), self.missing(slot, num_tokens)
        self.tables[slot, have : have + missing] = self._allocate(missing)
        self.num_pages[slot] += missing

    def adopt(self, slot: int, digests: Iterable[bytes]) -> int:
        """See `Pages.adopt`."""
        pages, have = self.pool.find(digests), int(self.num_pages[slot])
        self.pool.share(pages)
        self.tables[slot, have : have + len(pages)] = pages
        self.num_pages[slot] += len(pages)
        return len(pages)

    def publish(self, slot: int, first: int, digests: SequenceOf[bytes]) -> np.ndarray:
        """See `Pages.publish`; returns the pages that were added to the cache, [n] int32."""
        pages = self.tables[slot, first : first + len(digests)]
        return pages[[self.pool.cache(page, digest) for page, digest in zip(pages.tolist(), digests)]]

    def forget_idle(self) -> None:
        """Drop the cached pages that no spine holds."""
        self.pool.make_room(self.pool.num_free)

    def _allocate(self, num_pages: int) -> np.ndarray:
        return self.pool.allocate(num_pages)

    def _relink(self, slot: int, first: int, pages: np.ndarray) -> None:
        """Replace a spine's pages, from its page `first` on, by `pages`."""
        self.pool.release(self.tables[slot, first : self.num_pages[slot]][::-1])  # drop the least shared pages first
        self.tables[slot, first : first + len(pages)] = pages
        self.num_pages[slot] = first + len(pages)
