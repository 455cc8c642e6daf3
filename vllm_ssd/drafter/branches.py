"""The branches of all requests, as a struct of arrays that one batched step reads and writes."""

from __future__ import annotations

import numpy as np

from vllm_ssd.drafter.pool import PagePool


class Branches:
    """Up to `capacity` branches; row `i` of every array belongs to branch `i`.

    A branch starts at KV position `base` with its first token, a predicted bonus token, and holds up to
    `num_drafts` draft tokens after it. Its KV from the page of `base` on lies in pages of its own; all
    earlier positions are read through the pages of its request's trunk.

    tokens [capacity, K + 1] int64: first token, then drafts; the first `computed` have KV, and one more is
    drawn while `computed <= num_drafts`; the first `sent` drafts were pushed. candidates [capacity, K + 1, C]
    int32: likeliest tokens after each computed one. q_token_ids, q_probs [capacity, K, M]: the proposal each
    draft was drawn from.
    """

    def __init__(
        self, capacity: int, num_speculative_tokens: int, page_size: int, num_candidates: int, top_m: int
    ) -> None:
        k = num_speculative_tokens
        self.page_size = page_size
        self.owner = np.zeros(capacity, np.int64)
        self.accept_length = np.zeros(capacity, np.int64)
        self.base = np.zeros(capacity, np.int64)
        self.computed = np.zeros(capacity, np.int64)
        self.num_drafts = np.zeros(capacity, np.int64)
        self.sent = np.zeros(capacity, np.int64)
        self.alive = np.zeros(capacity, bool)
        self.tokens = np.zeros((capacity, k + 1), np.int64)
        self.candidates = np.zeros((capacity, k + 1, num_candidates), np.int32)
        self.q_token_ids = np.zeros((capacity, k, top_m), np.int32)
        self.q_probs = np.zeros((capacity, k, top_m), np.float32)
        self.pages = np.zeros((capacity, (k + page_size - 1) // page_size + 1), np.int32)
        self.num_pages = np.zeros(capacity, np.int64)
        self._free = list(range(capacity - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Branches that can still be added."""
        return len(self._free)

    def add(
        self, pool: PagePool, owner: int, accept_length: int, base: int, num_drafts: int, first_tokens: np.ndarray
    ) -> np.ndarray:
        """Rows `[n]` int64 of new branches, one for each of `first_tokens` `[n]`; `OutOfPages` adds none."""
        n = len(first_tokens)
        per_branch = (base + num_drafts) // self.page_size - base // self.page_size + 1
        pages = pool.allocate(n * per_branch).reshape(n, per_branch)
        rows = np.array([self._free.pop() for _ in range(n)], np.int64)
        self.owner[rows] = owner
        self.accept_length[rows] = accept_length
        self.base[rows] = base
        self.computed[rows] = 0
        self.sent[rows] = 0
        self.num_drafts[rows] = num_drafts
        self.alive[rows] = True
        self.tokens[rows, 0] = first_tokens
        self.pages[rows] = 0
        self.pages[rows, :per_branch] = pages
        self.num_pages[rows] = per_branch
        return rows

    def find(self, rows: np.ndarray, accept_length: int, first_token: int) -> int:
        """The row among `rows` that predicts this outcome, or -1."""
        match = rows[(self.accept_length[rows] == accept_length) & (self.tokens[rows, 0] == first_token)]
        return int(match[0]) if len(match) else -1

    def take_pages(self, row: int) -> np.ndarray:
        """Hand the pages of `row` over to the caller, `[num_pages]` int32; the row keeps none."""
        pages = self.pages[row, : self.num_pages[row]].copy()
        self.num_pages[row] = 0
        return pages

    def owned_pages(self, rows: np.ndarray) -> np.ndarray:
        """Pages held by `rows`, flat int32."""
        held = np.arange(self.pages.shape[1]) < self.num_pages[rows, None]
        return self.pages[rows][held]

    def remove(self, pool: PagePool, rows: np.ndarray) -> None:
        """Drop `rows`, giving their pages back."""
        pool.release(self.owned_pages(rows))
        self.num_pages[rows] = 0
        self.alive[rows] = False
        self._free.extend(rows.tolist())
