"""KV pages of spines and branches whose page tables live on the host."""

from __future__ import annotations

import numpy as np

from vllm_ssd.compat.drafter.paged import ForwardBatch, PagedModel
from vllm_ssd.drafter.branches import JIT_ACCEPT_LENGTH, Branches
from vllm_ssd.drafter.pages.pool import NO_PAGES
from vllm_ssd.drafter.pages.spines import SpinePages
from vllm_ssd.drafter.step_tokens import StepTokens


class HostPages(SpinePages):
    """`Pages` for vLLM's own attention: every branch is a sequence with a page table.

    branch_pages [capacity, Q] int32, num_branch_pages [capacity] int64: the pages that each branch owns.
    """

    def __init__(self, model: PagedModel, branches: Branches) -> None:
        super().__init__(model, branches.max_num_seqs)
        self._branches = branches
        capacity, size = len(branches.alive), self.page_size
        self.branch_pages = np.zeros((capacity, (branches.num_speculative_tokens + size - 1) // size + 1), np.int32)
        self.num_branch_pages = np.zeros(capacity, np.int64)
        self._copies: dict[int, int] = {}  # pending copies: destination page -> source page

    @property
    def num_free(self) -> int:
        """Pages that no spine or branch holds."""
        return self.pool.num_free

    def needed(self, rows: np.ndarray) -> int:
        """Pages that `fork` takes for new branches in `rows`: up to their last drafts."""
        base, num_drafts = int(self._branches.base[rows[0]]), int(self._branches.num_drafts[rows[0]])
        return len(rows) * ((base + num_drafts) // self.page_size - base // self.page_size + 1)

    def fork(self, rows: np.ndarray) -> None:
        """See `Pages.fork`."""
        branches, first = self._branches, rows[0]
        pages = self.pool.allocate(self.needed(rows)).reshape(len(rows), -1)
        self.branch_pages[rows] = 0
        self.branch_pages[rows, : pages.shape[1]] = pages
        self.num_branch_pages[rows] = pages.shape[1]
        base = int(branches.base[first])
        if base % self.page_size or branches.accept_length[first] == JIT_ACCEPT_LENGTH:
            source = int(self.tables[branches.owner[first], base // self.page_size])
            source = self._copies.get(source, source)
            for destination in pages[:, 0].tolist():
                self._copies[destination] = source

    def commit(self, slot: int, rows: np.ndarray, winner: int = -1) -> None:
        """Free the branches in `rows`; a `winner` among them becomes the spine from the page of its base on."""
        if winner >= 0:
            base = int(self._branches.base[winner])
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

    def batch(self, tokens: StepTokens) -> ForwardBatch:
        """Make the pending page copies, reading all sources before any write, and build the forward of `tokens`."""
        if self._copies:
            self._model.copy_pages(list(self._copies.values()), list(self._copies))
            self._copies.clear()
        spines, rows, token_rows, size = tokens.spines, tokens.rows, tokens.token_rows, self.page_size
        num_spine_tokens = len(tokens.positions) - len(token_rows)
        query_lens = np.array([n for _, n in spines], np.int64)
        row_lens = np.diff(np.append(np.flatnonzero(np.diff(token_rows, prepend=-1)), len(token_rows)))
        slots = np.array([s.slot for s, _ in spines], np.int64)
        spine_pages = self.tables[np.repeat(slots, query_lens), tokens.positions[:num_spine_tokens] // size]
        row_positions = tokens.positions[num_spine_tokens:]
        first_page = self._branches.base[rows] // size
        own_pages = self.branch_pages[rows]
        row_pages = self.branch_pages[token_rows, row_positions // size - self._branches.base[token_rows] // size]
        row_ends = row_positions[np.cumsum(row_lens) - 1] + 1

        width = int(tokens.positions.max()) // size + own_pages.shape[1]
        page_tables = np.ascontiguousarray(self.tables[np.concatenate([slots, self._branches.owner[rows]]), :width])
        columns = first_page[:, None] + np.arange(own_pages.shape[1])
        np.put_along_axis(page_tables[len(spines) :], columns, own_pages, axis=1)
        pages = np.concatenate([spine_pages, row_pages]).astype(np.int64)
        return ForwardBatch(
            token_ids=tokens.token_ids,
            positions=tokens.positions,
            slots=pages * size + tokens.positions % size,
            query_start_loc=np.cumsum([0, *query_lens, *row_lens]).astype(np.int32),
            seq_lens=np.array([s.computed + n for s, n in spines] + row_ends.tolist(), np.int32),
            page_tables=page_tables,
            logit_indices=tokens.logit_indices,
        )
