"""Let a new spine read the full pages of another."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_ssd.kernels.dispatch import require_contiguous, use_triton
from vllm_ssd.kernels.trees import DevicePool, Trees


def share(pool: DevicePool, trees: Trees, sources: torch.Tensor, num_pages: torch.Tensor) -> None:
    """Begin empty spines with the first `num_pages` [S] int32 pages of the spines `sources` [S] int32.

    0 pages leave a request alone; otherwise its source has as many, and gets none in the same call. Each page gains a
    holder: from then on nobody may write it. In place, one launch.
    """
    if not use_triton(pool.free):
        _share_reference(pool, trees, sources, num_pages)
        return
    require_contiguous(sources, num_pages)
    if len(sources):
        _share_kernel[(len(sources),)](
            pool.holders,
            trees.page_tables,
            trees.num_pages,
            sources,
            num_pages,
            trees.page_tables.stride(0),
            BLOCK=128,
        )


def _share_reference(pool: DevicePool, trees: Trees, sources: torch.Tensor, num_pages: torch.Tensor) -> None:
    for r, n in enumerate(num_pages.tolist()):
        if n:
            pages = trees.page_tables[int(sources[r]), :n]
            pool.holders[pages] += 1
            trees.page_tables[r, :n] = pages
            trees.num_pages[r] = n


@triton.jit
def _share_kernel(
    holders_ptr,
    page_tables_ptr,
    num_pages_ptr,
    sources_ptr,
    num_shared_ptr,
    table_stride,
    BLOCK: tl.constexpr,
):
    """One program a request. Several may share from one source, so holders are counted atomically."""
    r = tl.program_id(0)
    n = tl.load(num_shared_ptr + r)
    if n > 0:
        source = tl.load(sources_ptr + r)
        for start in range(0, n, BLOCK):
            i = start + tl.arange(0, BLOCK)
            mask = i < n
            page = tl.load(page_tables_ptr + source * table_stride + i, mask=mask, other=0)
            tl.atomic_add(holders_ptr + page, 1, mask=mask)
            tl.store(page_tables_ptr + r * table_stride + i, page, mask=mask)
        tl.store(num_pages_ptr + r, n)
