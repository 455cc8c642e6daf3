"""The pages of the spines, which host and device count alike."""

from __future__ import annotations

import numpy as np

from vllm_ssd.compat.drafter.paged import PagedModel
from vllm_ssd.drafter.pages.pool import PagePool

NO_PAGES = np.empty(0, np.int32)


class SpinePages:
    """Which pages the spines in `max_num_seqs` slots hold; `HostPages` and `DevicePages` add those of the branches.

    tables [S, W] int32 and num_pages [S] int64: the pages of each spine, of `pool`. Full pages may be shared.
    """

    def __init__(self, model: PagedModel, max_num_seqs: int) -> None:
        self._model = model
        self.page_size = model.page_size
        self.capacity = model.num_pages
        self.pool = PagePool(model.num_pages)
        self.tables = np.zeros((max_num_seqs, model.max_model_len // model.page_size + 3), np.int32)
        self.num_pages = np.zeros(max_num_seqs, np.int64)

    def missing(self, slot: int, num_tokens: int) -> int:
        """Pages that a spine lacks to hold `num_tokens`."""
        return max(-(-num_tokens // self.page_size) - int(self.num_pages[slot]), 0)

    def reserve(self, slot: int, num_tokens: int) -> None:
        """Give a spine the pages it lacks; as many must be free."""
        have, missing = int(self.num_pages[slot]), self.missing(slot, num_tokens)
        self.tables[slot, have : have + missing] = self.pool.allocate(missing)
        self.num_pages[slot] += missing

    def share(self, slot: int, other: int, num_pages: int) -> None:
        """Begin the empty spine of `slot` with the first pages of another's, all of them full."""
        shared = self.tables[other, :num_pages]
        self.pool.share(shared)
        self.tables[slot, :num_pages] = shared
        self.num_pages[slot] = num_pages

    def _relink(self, slot: int, first: int, pages: np.ndarray) -> None:
        """Put `pages` in the place of a spine's from its page `first` on."""
        self.pool.release(self.tables[slot, first : self.num_pages[slot]])
        self.tables[slot, first : first + len(pages)] = pages
        self.num_pages[slot] = first + len(pages)
