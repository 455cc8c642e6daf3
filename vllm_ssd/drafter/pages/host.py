"""Where the KV of spines and branches lies, kept on the host: page tables, reference counts, copies to be made."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np

from vllm_ssd.compat.drafter.paged import ForwardBatch, PagedModel
from vllm_ssd.drafter.branches import Branches
from vllm_ssd.drafter.forward import StepTokens
from vllm_ssd.drafter.pages.pool import PagePool
from vllm_ssd.drafter.sequence import Sequence

NO_PAGES = np.empty(0, np.int32)


class SpinePages:
    """Which pages the spines in `max_num_seqs` slots hold; `HostPages` and `DevicePages` add those of the branches.

    tables [S, W] int32 and num_pages [S] int64: the pages of each spine, of `pool`. Full pages may be shared.
    """

    def __init__(self, model: PagedModel, max_num_seqs: int) -> None:
        self._model = model
        self.page_size = model.page_size
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


class HostPages(SpinePages):
    """Page tables of the spines in `max_num_seqs` slots, and own pages of `max_branches` branches (and one) for each.

    A spine's pages may be shared with other requests. A branch reads its spine's full pages before its base and owns
    the pages from there on, allocated whole when it starts.
    """

    def __init__(
        self, model: PagedModel, max_num_seqs: int, max_branches: int, num_speculative_tokens: int, num_candidates: int
    ) -> None:
        super().__init__(model, max_num_seqs)
        capacity, size = max_num_seqs * (max_branches + 1), self.page_size
        self.branch_pages = np.zeros((capacity, (num_speculative_tokens + size - 1) // size + 1), np.int32)
        self.num_branch_pages = np.zeros(capacity, np.int64)
        self._copies: dict[int, int] = {}  # destination page -> source page, before the next forward

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return self.pool.num_free

    def per_branch(self, base: int, num_drafts: int) -> int:
        """Pages that a branch of `num_drafts` from position `base` owns."""
        return (base + num_drafts) // self.page_size - base // self.page_size + 1

    def fork(
        self,
        slot: int,
        rows: np.ndarray,
        accept_length: int,
        base: int,
        num_drafts: int,
        tokens: np.ndarray,
        filled: int,
    ) -> None:
        """Pages for new branches in `rows` [n] that start with `tokens` [n] at position `base`.

        Slots below position `filled` of the page of the base are copied from the spine. As many pages as the branches
        need must be free.
        """
        per_branch = self.per_branch(base, num_drafts)
        pages = self.pool.allocate(len(rows) * per_branch).reshape(len(rows), per_branch)
        self.branch_pages[rows] = 0
        self.branch_pages[rows, :per_branch] = pages
        self.num_branch_pages[rows] = per_branch
        if filled > base - base % self.page_size:
            source = int(self.tables[slot, base // self.page_size])
            source = self._copies.get(source, source)
            for destination in pages[:, 0].tolist():
                self._copies[destination] = source

    def commit(self, slot: int, rows: np.ndarray, winner: int = -1, base: int = 0) -> None:
        """Free the branches in `rows`; a `winner` among them becomes the spine from the page of its base on."""
        if winner >= 0:
            self._relink(slot, base // self.page_size, self.branch_pages[winner, : self.num_branch_pages[winner]])
            self.num_branch_pages[winner] = 0
        self.pool.release(self.owned(rows))
        self.num_branch_pages[rows] = 0

    def close(self, slot: int, rows: np.ndarray) -> None:
        """Free a spine and its branches."""
        self.commit(slot, rows)
        self._relink(slot, 0, NO_PAGES)

    def owned(self, rows: np.ndarray) -> np.ndarray:
        """Pages of the branches in `rows`, flat int32."""
        held = np.arange(self.branch_pages.shape[1]) < self.num_branch_pages[rows, None]
        return self.branch_pages[rows][held]

    def batch(
        self, branches: Branches, spines: SequenceOf[tuple[Sequence, int]], rows: np.ndarray, tokens: StepTokens
    ) -> ForwardBatch:
        """The forward of `tokens`: the next of each spine, then one of each branch in `rows`.

        Makes the copies that are due: all sources are read before any page is written.
        """
        if self._copies:
            self._model.copy_pages(list(self._copies.values()), list(self._copies))
            self._copies.clear()
        size, num_spine_tokens = self.page_size, len(tokens.positions) - len(rows)
        query_lens = np.array([n for _, n in spines], np.int64)
        slots = np.array([s.slot for s, _ in spines], np.int64)
        spine_pages = self.tables[np.repeat(slots, query_lens), tokens.positions[:num_spine_tokens] // size]
        row_positions = tokens.positions[num_spine_tokens:]
        first_page = branches.base[rows] // size
        own_pages = self.branch_pages[rows]
        row_pages = own_pages[np.arange(len(rows)), row_positions // size - first_page]

        width = int(tokens.positions.max()) // size + own_pages.shape[1]
        page_tables = np.ascontiguousarray(self.tables[np.concatenate([slots, branches.owner[rows]]), :width])
        columns = first_page[:, None] + np.arange(own_pages.shape[1])
        np.put_along_axis(page_tables[len(spines) :], columns, own_pages, axis=1)
        pages = np.concatenate([spine_pages, row_pages]).astype(np.int64)
        return ForwardBatch(
            token_ids=tokens.token_ids,
            positions=tokens.positions,
            slots=pages * size + tokens.positions % size,
            query_start_loc=np.concatenate(
                [[0], np.cumsum(query_lens), num_spine_tokens + 1 + np.arange(len(rows))]
            ).astype(np.int32),
            seq_lens=np.array([s.computed + n for s, n in spines] + (row_positions + 1).tolist(), np.int32),
            page_tables=page_tables,
            logit_indices=tokens.logit_indices,
        )
