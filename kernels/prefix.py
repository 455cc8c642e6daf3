"""The drafter's prefix cache: pages that outlive their spines, under names that the host gives them.

Each op is a few tensor operations on whatever device, without a kernel: they run when a request opens on pages of
others or ends, not in a round.
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
    """Hold the pages in `columns` [n] of the spines in `slots` [n], and remember them in `kept` [P] int32 by `names`.

    int64, names distinct and not in use. Each page gains a holder: from then on nobody may write it. In place.
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
    """Add the pages kept as `names` [n] to the spines in `slots` [n], as their `columns` [n], the next ones. In place.

    int64. Each page gains a holder.
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
