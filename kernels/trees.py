"""Device-resident state shared by the ops: the pool of KV pages and the token trees of all requests."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class DevicePool:
    """`P` KV pages, each free or held; reference counts and the free stack live on the device.

    free [P] int32, a stack whose first `num_free` entries are the free pages; num_free [1] int32;
    holders [P] int32, 0 for free pages. A page held once may be written by its holder, a page held more often is
    read-only. The ops that take a pool must run in one stream order.
    """

    free: torch.Tensor
    num_free: torch.Tensor
    holders: torch.Tensor

    @classmethod
    def full(cls, num_pages: int, device: torch.device | str) -> DevicePool:
        """A pool in which all `num_pages` pages are free; page 0 is handed out first."""
        return cls(
            torch.arange(num_pages - 1, -1, -1, dtype=torch.int32, device=device),
            torch.full((1,), num_pages, dtype=torch.int32, device=device),
            torch.zeros(num_pages, dtype=torch.int32, device=device),
        )


@dataclass(frozen=True, slots=True)
class Trees:
    """The spines of up to `S` requests and up to `N` branches of each; -1 stands for no page, branch or slot.

    A spine holds committed tokens and the drafts under verification. A branch starts at KV position `bases`, where its
    first token (a predicted bonus token) goes, and has room for `K` drafts after it. It reads every position before
    the page of its base through its request's `page_tables`; from there on it owns pages, at most `Q`.

    page_tables [S, W] int32 and num_pages [S] int32: the pages of each spine.
    accept_lengths, first_tokens, bases [S, N] int32: the outcome each branch predicts, and where it starts.
    branch_pages [S, N, Q] int32; slots [S, N, K + 1] int64: KV slot (page * page_size + offset) of each step.
    copy_sources, copy_lens [S, N] int32: spine page whose first `copy_lens` slots go into `branch_pages[..., 0]`
    before the branch's first step; 0 if nothing is left to copy.
    """

    page_size: int
    page_tables: torch.Tensor
    num_pages: torch.Tensor
    accept_lengths: torch.Tensor
    first_tokens: torch.Tensor
    bases: torch.Tensor
    branch_pages: torch.Tensor
    slots: torch.Tensor
    copy_sources: torch.Tensor
    copy_lens: torch.Tensor

    @property
    def max_len(self) -> int:
        """Most tokens of a spine."""
        return self.page_tables.shape[1] * self.page_size

    @classmethod
    def empty(
        cls,
        num_requests: int,
        max_branches: int,
        num_speculative_tokens: int,
        page_size: int,
        table_width: int,
        device: torch.device | str,
    ) -> Trees:
        """Trees without spines or branches. `table_width` pages bound the length of a spine."""

        def none(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.full(shape, -1, dtype=dtype, device=device)

        s, n, k = num_requests, max_branches, num_speculative_tokens
        return cls(
            page_size,
            page_tables=none(s, table_width),
            num_pages=torch.zeros(s, dtype=torch.int32, device=device),
            accept_lengths=none(s, n),
            first_tokens=none(s, n),
            bases=none(s, n),
            branch_pages=none(s, n, (k + page_size - 1) // page_size + 1),
            slots=none(s, n, k + 1, dtype=torch.int64),
            copy_sources=none(s, n),
            copy_lens=torch.zeros(s, n, dtype=torch.int32, device=device),
        )
