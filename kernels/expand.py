"""Start the branches of a round: one for each predicted outcome."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_ssd.kernels.dispatch import require_contiguous, use_triton
from vllm_ssd.kernels.trees import DevicePool, Trees


def expand(
    pool: DevicePool,
    trees: Trees,
    lengths: torch.Tensor,
    draft_token_ids: torch.Tensor,
    candidates: torch.Tensor,
    fan_out: torch.Tensor,
    forks: torch.Tensor,
    slots: torch.Tensor | None = None,
) -> None:
    """Start branches in `trees` with pages from `pool`; one launch, without host synchronisation.

    slots [S] int32: the requests' slots in `trees`; None for all of them in order.
    lengths [S] int32: committed tokens L. A branch of accept length k starts at position L + k.
    draft_token_ids [S, K] int32: the drafts under verification, -1 beyond the last.
    candidates [S, K + 1, C] int32: likeliest bonus tokens of each accept length, best first. The draft at that position
    is skipped if it is among them, because an outcome never repeats the draft that it rejects.
    fan_out [S, K + 1] int32: branches per accept length, each below C, at most N in total.
    forks [S, 2] int32: the half-open range of accept lengths whose branches start now; empty leaves a request alone.

    Rows are ordered by accept length, then by candidate, over the whole `fan_out`, so a round may be expanded in
    several waves as candidates become known. If pages run out, a request's last rows stay empty. Which request gets the
    last pages is undefined (in the reference: the first).
    """
    if not use_triton(pool.free):
        _expand_reference(pool, trees, lengths, draft_token_ids, candidates, fan_out, forks, slots)
        return
    require_contiguous(lengths, draft_token_ids, candidates, fan_out, forks)
    num_requests, num_forks, num_candidates = candidates.shape
    max_branches, max_pages = trees.branch_pages.shape[1:]
    if num_requests:
        _expand_kernel[(num_requests,)](
            pool.free,
            pool.num_free,
            pool.holders,
            trees.page_tables,
            trees.accept_lengths,
            trees.first_tokens,
            trees.bases,
            trees.branch_pages,
            trees.slots,
            trees.copy_sources,
            trees.copy_lens,
            lengths,
            draft_token_ids,
            candidates,
            fan_out,
            forks,
            slots,
            trees.page_tables.stride(0),
            PAGE_SIZE=trees.page_size,
            K=num_forks - 1,
            C=num_candidates,
            N=max_branches,
            Q=max_pages,
            BLOCK_K=triton.next_power_of_2(num_forks),
            BLOCK_C=triton.next_power_of_2(num_candidates),
            BLOCK_N=triton.next_power_of_2(max_branches),
            BLOCK_Q=triton.next_power_of_2(max_pages),
        )


def _expand_reference(
    pool: DevicePool,
    trees: Trees,
    lengths: torch.Tensor,
    draft_token_ids: torch.Tensor,
    candidates: torch.Tensor,
    fan_out: torch.Tensor,
    forks: torch.Tensor,
    slots: torch.Tensor | None,
) -> None:
    page_size, num_drafts = trees.page_size, draft_token_ids.shape[1]
    steps = torch.arange(num_drafts + 1)
    for i, (begin, end) in enumerate(forks.tolist()):
        r = i if slots is None else int(slots[i])
        outcomes = []
        for k in range(begin, end):
            draft = int(draft_token_ids[i, k]) if k < num_drafts else -1
            tokens = [token for token in candidates[i, k].tolist() if token != draft]
            outcomes += [(k, token) for token in tokens[: int(fan_out[i, k])]]
        if begin < end:
            trees.copy_lens[r] = 0  # those of an earlier wave were copied
        for row, (k, token) in enumerate(outcomes, start=int(fan_out[i, :begin].sum())):
            base = int(lengths[i]) + k
            first_page, offset = divmod(base, page_size)
            num_pages = (offset + num_drafts) // page_size + 1
            num_free = int(pool.num_free)
            if num_pages > num_free:
                break
            pages = pool.free[num_free - num_pages : num_free].flip(0)
            pool.num_free.sub_(num_pages)
            pool.holders[pages] = 1
            trees.accept_lengths[r, row] = k
            trees.first_tokens[r, row] = token
            trees.bases[r, row] = base
            trees.branch_pages[r, row, :num_pages] = pages
            in_page = offset + steps
            trees.slots[r, row] = pages[in_page // page_size].long() * page_size + in_page % page_size
            trees.copy_sources[r, row] = trees.page_tables[r, first_page] if offset else -1
            trees.copy_lens[r, row] = offset


@triton.jit
def _expand_kernel(
    free_ptr,
    num_free_ptr,
    holders_ptr,
    page_tables_ptr,
    accept_lengths_ptr,
    first_tokens_ptr,
    bases_ptr,
    branch_pages_ptr,
    slots_ptr,
    copy_sources_ptr,
    copy_lens_ptr,
    lengths_ptr,
    draft_token_ids_ptr,
    candidates_ptr,
    fan_out_ptr,
    forks_ptr,
    request_slots_ptr,
    table_stride,
    PAGE_SIZE: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """One program a request; its rows are one block."""
    i = tl.program_id(0)
    begin = tl.load(forks_ptr + 2 * i)
    end = tl.load(forks_ptr + 2 * i + 1)
    if begin >= end:
        return
    r = i
    if request_slots_ptr is not None:
        r = tl.load(request_slots_ptr + i)
    length = tl.load(lengths_ptr + i)

    # Which accept length k and which candidate rank each row of the request stands for.
    fork = tl.arange(0, BLOCK_K)
    fan_out = tl.load(fan_out_ptr + i * (K + 1) + fork, mask=fork <= K, other=0)
    last = tl.cumsum(fan_out, 0)  # rows of this and all shorter accept lengths
    row = tl.arange(0, BLOCK_N)
    k = tl.sum((row[:, None] >= last[None, :]).to(tl.int32), 1)
    starts = (k >= begin) & (k < end) & (k <= K) & (row < N)
    rank = row - tl.sum(tl.where(fork[None, :] == k[:, None], (last - fan_out)[None, :], 0), 1)

    # Pages: claim [top - taken, top) of the stack for the first rows that fit. Programs only ever lower the counter, so
    # an exchange that succeeds has claimed entries that nobody else has. The counter is read atomically: a plain load
    # is every thread's own, and they might see different values.
    base = length + k
    offset = base % PAGE_SIZE
    need = tl.where(starts, (offset + K) // PAGE_SIZE + 1, 0)
    before = tl.cumsum(need, 0) - need
    top = tl.atomic_add(num_free_ptr, 0)
    taken = tl.sum(tl.where(before + need <= top, need, 0), 0)
    seen = tl.atomic_cas(num_free_ptr, top, top - taken)
    while seen != top:
        top = seen
        taken = tl.sum(tl.where(before + need <= top, need, 0), 0)
        seen = tl.atomic_cas(num_free_ptr, top, top - taken)
    starts = starts & (before + need <= top)
    first_entry = top - 1 - before

    # The bonus token: the candidate of this rank, counted without the draft that the outcome rejects.
    out = r * N + row
    fork_row = (i * (K + 1) + k) * C
    draft = tl.load(draft_token_ids_ptr + i * K + k, mask=starts & (k < K), other=-1)
    c = tl.arange(0, BLOCK_C)
    candidates = tl.load(
        candidates_ptr + fork_row[:, None] + c[None, :], mask=starts[:, None] & (c[None, :] < C), other=-2
    )
    draft_rank = tl.min(tl.where(candidates == draft[:, None], c[None, :], C), 1)
    choice = rank + (rank >= draft_rank).to(tl.int32)
    token = tl.load(candidates_ptr + fork_row + choice, mask=starts, other=-1)
    tl.store(accept_lengths_ptr + out, k, mask=starts)
    tl.store(first_tokens_ptr + out, token, mask=starts)
    tl.store(bases_ptr + out, base, mask=starts)

    source = tl.load(page_tables_ptr + r * table_stride + base // PAGE_SIZE, mask=starts & (offset > 0), other=-1)
    tl.store(copy_sources_ptr + out, source, mask=starts)
    # Rows of an earlier wave were copied: nothing is left of them.
    tl.store(copy_lens_ptr + out, tl.where(starts, offset, 0), mask=row < N)

    q = tl.arange(0, BLOCK_Q)
    owned = starts[:, None] & (q[None, :] < need[:, None])
    page = tl.load(free_ptr + first_entry[:, None] - q[None, :], mask=owned, other=-1)
    tl.store(holders_ptr + page, 1, mask=owned)
    tl.store(branch_pages_ptr + out[:, None] * Q + q[None, :], page, mask=owned)

    step = tl.arange(0, BLOCK_K)
    in_page = offset[:, None] + step[None, :]
    stepped = starts[:, None] & (step[None, :] <= K)
    step_page = tl.load(free_ptr + first_entry[:, None] - in_page // PAGE_SIZE, mask=stepped, other=0)
    slot = step_page.to(tl.int64) * PAGE_SIZE + in_page % PAGE_SIZE
    tl.store(slots_ptr + out[:, None] * (K + 1) + step[None, :], slot, mask=stepped)
