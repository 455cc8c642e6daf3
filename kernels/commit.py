"""After an outcome: the winning branch becomes spine, everything else returns to the pool."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_ssd.kernels.dispatch import require_contiguous, use_triton
from vllm_ssd.kernels.trees import DevicePool, Trees

MISS = -1
"""No branch won: free all branches, keep the spine."""
CLOSE = -2
"""The request has ended: free its branches and its spine."""
SKIP = -3
"""The request has no outcome: change nothing."""


def commit(pool: DevicePool, trees: Trees, winners: torch.Tensor, slots: torch.Tensor | None = None) -> None:
    """Make the winning branch of each request its spine and free the others; one launch, no host synchronisation.

    winners [S] int32: the row that won, or `MISS`, `CLOSE` or `SKIP`; slots [S] int32: the requests, None for all of
    them in order. A winner's pages replace those of the spine from the page of its base on. Pages lose one holder each;
    those without any go back on the free stack, so that afterwards free + held = P. In place; all rows of the requests
    that are not skipped are empty afterwards.
    """
    if not use_triton(pool.free):
        _commit_reference(pool, trees, winners, slots)
        return
    require_contiguous(winners)
    max_branches, max_pages = trees.branch_pages.shape[1:]
    if len(winners):
        _commit_kernel[(len(winners),)](
            pool.free,
            pool.num_free,
            pool.holders,
            trees.page_tables,
            trees.num_pages,
            trees.accept_lengths,
            trees.bases,
            trees.branch_pages,
            trees.copy_lens,
            winners,
            slots,
            trees.page_tables.stride(0),
            PAGE_SIZE=trees.page_size,
            N=max_branches,
            Q=max_pages,
            BLOCK_N=triton.next_power_of_2(max_branches),
            BLOCK_Q=triton.next_power_of_2(max_pages),
            BLOCK_NQ=triton.next_power_of_2(max_branches * max_pages),
            BLOCK_W=128,
        )


def _commit_reference(pool: DevicePool, trees: Trees, winners: torch.Tensor, slots: torch.Tensor | None) -> None:
    for i, winner in enumerate(winners.tolist()):
        r = i if slots is None else int(slots[i])
        if winner == SKIP:
            continue
        owned = trees.branch_pages[r]
        won = owned[winner][owned[winner] >= 0] if winner >= 0 else owned[0, :0]
        lost = owned[torch.arange(len(owned)) != winner]
        have = int(trees.num_pages[r])
        keep = int(trees.bases[r, winner]) // trees.page_size if winner >= 0 else have if winner == MISS else 0
        for pages in (lost[lost >= 0], trees.page_tables[r, keep:have]):
            pool.holders[pages] -= 1
            freed = pages[pool.holders[pages] == 0]
            num_free = int(pool.num_free)
            pool.free[num_free : num_free + len(freed)] = freed
            pool.num_free.add_(len(freed))
        trees.page_tables[r, keep : keep + len(won)] = won
        trees.num_pages[r] = keep + len(won)
        trees.branch_pages[r] = -1
        trees.accept_lengths[r] = -1
        trees.copy_lens[r] = 0


@triton.jit
def _release(pages, held, free_ptr, num_free_ptr, holders_ptr):
    """Take one holder from each page of a flat block and push those that have none left."""
    freed = held & (tl.atomic_add(holders_ptr + pages, -1, mask=held) == 1)
    pushed = freed.to(tl.int32)
    bottom = tl.atomic_add(num_free_ptr, tl.sum(pushed, 0))
    tl.store(free_ptr + bottom + tl.cumsum(pushed, 0) - pushed, pages, mask=freed)


@triton.jit
def _commit_kernel(
    free_ptr,
    num_free_ptr,
    holders_ptr,
    page_tables_ptr,
    num_pages_ptr,
    accept_lengths_ptr,
    bases_ptr,
    branch_pages_ptr,
    copy_lens_ptr,
    winners_ptr,
    request_slots_ptr,
    table_stride,
    PAGE_SIZE: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_NQ: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """One program a request. Pages are only pushed here, so the order of programs does not matter."""
    r = tl.program_id(0)
    winner = tl.load(winners_ptr + r)
    if winner == -3:  # SKIP
        return
    if request_slots_ptr is not None:
        r = tl.load(request_slots_ptr + r)
    table = page_tables_ptr + r * table_stride
    have = tl.load(num_pages_ptr + r)
    keep = tl.where(winner == -1, have, 0)  # MISS, CLOSE
    q = tl.arange(0, BLOCK_Q)
    own = branch_pages_ptr + r * N * Q
    won = tl.load(own + winner * Q + q, mask=(winner >= 0) & (q < Q), other=-1)
    if winner >= 0:
        keep = tl.load(bases_ptr + r * N + winner) // PAGE_SIZE

    i = tl.arange(0, BLOCK_NQ)
    owned = tl.load(own + i, mask=i < N * Q, other=-1)
    _release(owned, (owned >= 0) & (i // Q != winner), free_ptr, num_free_ptr, holders_ptr)
    for start in range(keep, have, BLOCK_W):
        column = start + tl.arange(0, BLOCK_W)
        pages = tl.load(table + column, mask=column < have, other=-1)
        _release(pages, column < have, free_ptr, num_free_ptr, holders_ptr)

    tl.debug_barrier()  # threads overwrite below what other threads read above
    tl.store(table + keep + q, won, mask=won >= 0)
    tl.store(num_pages_ptr + r, keep + tl.sum((won >= 0).to(tl.int32), 0))
    row = tl.arange(0, BLOCK_N)
    tl.store(own + i, -1, mask=i < N * Q)
    tl.store(accept_lengths_ptr + r * N + row, -1, mask=row < N)
    tl.store(copy_lens_ptr + r * N + row, 0, mask=row < N)
