"""The drafter's prefix cache: pages that outlive their spines, under names chosen by the host.

The ops are plain tensor operations without a kernel, because they only run when a request ends or adopts cached pages,
not in every round.
"""

from __future__ import annotations

import torch

from vllm_ssd.kernels.trees import DevicePool, Trees


def keep(
    pool: DevicePool,
    trees: Trees,
    kept: torch.Tensor,
    slots: torch.Tensor,
    columns: torch.Tensor,
    names: torch.Tensor,
) -> None:
    """Add the pages in `columns` [n] of the spines in `slots` [n] to `kept` [P] int32 under `names` [n]; in place.

    All three are int64; names must be distinct and unused. Each page gains a holder, so nobody may write it any more.
    """
    pages = trees.page_tables[slots, columns]
    kept[names] = pages
    pool.holders.index_add_(0, pages, torch.ones_like(pages))


def adopt(
    pool: DevicePool,
    trees: Trees,
    kept: torch.Tensor,
    slots: torch.Tensor,
    columns: torch.Tensor,
    names: torch.Tensor,
) -> None:
    """Append the pages kept as `names` [n] to the spines in `slots` [n], at their next `columns` [n]; in place.

    All three are int64. Each page gains a holder.
    """
    pages = kept[names]
    trees.page_tables[slots, columns] = pages
    ones = torch.ones_like(pages)
    trees.num_pages.index_add_(0, slots, ones)
    pool.holders.index_add_(0, pages, ones)


def drop(pool: DevicePool, kept: torch.Tensor, names: torch.Tensor) -> None:
    """Push the pages kept as `names` [n] int64, which nobody else holds, onto the free stack. In place."""
    pages = kept[names]
    pool.holders[pages.long()] = 0
    top = pool.num_free + torch.arange(len(pages), device=pages.device)
    pool.free.index_copy_(0, top, pages)
    pool.num_free.add_(len(pages))
