"""Give spines the pages for their next tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_ssd.kernels.dispatch import require_contiguous, use_triton
from vllm_ssd.kernels.trees import DevicePool, Trees


def reserve(pool: DevicePool, trees: Trees, num_tokens: torch.Tensor, slots: torch.Tensor | None = None) -> None:
    """Pop pages so that each spine can hold `num_tokens` [S] int32 tokens; 0 leaves a request alone.

    slots [S] int32: the requests; None for all of them in order.

    A spine gets all the pages that it lacks or, if fewer are free, none; check `trees.num_pages`. Only prompts and
    tokens that no branch predicted need this, since branches have their own pages. In place, one launch.
    """
    if not use_triton(pool.free):
        _reserve_reference(pool, trees, num_tokens, slots)
        return
    require_contiguous(num_tokens)
    if len(num_tokens):
        _reserve_kernel[(len(num_tokens),)](
            pool.free,
            pool.num_free,
            pool.holders,
            trees.page_tables,
            trees.num_pages,
            num_tokens,
            slots,
            trees.page_tables.stride(0),
            PAGE_SIZE=trees.page_size,
            BLOCK=128,
        )


def _reserve_reference(pool: DevicePool, trees: Trees, num_tokens: torch.Tensor, slots: torch.Tensor | None) -> None:
    for i, wanted in enumerate(num_tokens.tolist()):
        r = i if slots is None else int(slots[i])
        have = int(trees.num_pages[r])
        missing = -(-wanted // trees.page_size) - have
        num_free = int(pool.num_free)
        if not 0 < missing <= num_free:
            continue
        pages = pool.free[num_free - missing : num_free].flip(0)
        pool.num_free.sub_(missing)
        pool.holders[pages] = 1
        trees.page_tables[r, have : have + missing] = pages
        trees.num_pages[r] += missing


@triton.jit
def _reserve_kernel(
    free_ptr,
    num_free_ptr,
    holders_ptr,
    page_tables_ptr,
    num_pages_ptr,
    num_tokens_ptr,
    request_slots_ptr,
    table_stride,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a request."""
    r = tl.program_id(0)
    wanted = tl.load(num_tokens_ptr + r)
    if request_slots_ptr is not None:
        r = tl.load(request_slots_ptr + r)
    have = tl.load(num_pages_ptr + r)
    missing = tl.cdiv(wanted, PAGE_SIZE) - have
    if missing > 0:
        # Claim [top - missing, top) of the stack, as in expand.
        top = tl.atomic_add(num_free_ptr, 0)
        seen = tl.atomic_cas(num_free_ptr, top, top - tl.where(missing <= top, missing, 0))
        while seen != top:
            top = seen
            seen = tl.atomic_cas(num_free_ptr, top, top - tl.where(missing <= top, missing, 0))
        if missing <= top:
            for start in range(0, missing, BLOCK):
                i = start + tl.arange(0, BLOCK)
                mask = i < missing
                page = tl.load(free_ptr + top - 1 - i, mask=mask, other=0)
                tl.store(holders_ptr + page, 1, mask=mask)
                tl.store(page_tables_ptr + r * table_stride + have + i, page, mask=mask)
            tl.debug_barrier()  # every thread has read `have` before it changes
            tl.store(num_pages_ptr + r, have + missing)
