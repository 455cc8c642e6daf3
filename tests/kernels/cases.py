"""What several kernel tests share: the device, random trees, and their comparison."""

from __future__ import annotations

import dataclasses
import random

import torch

from vllm_ssd.kernels import DevicePool, Trees, reserve
from vllm_ssd.kernels import reference_ops as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def to(state, device: str):
    """A copy of a dataclass of tensors on `device`."""
    copied = {
        f.name: value.to(device, copy=True)
        for f in dataclasses.fields(state)
        if isinstance(value := getattr(state, f.name), torch.Tensor)
    }
    return dataclasses.replace(state, **copied)


def ints(values, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """A tensor on the CPU, where cases are made."""
    return torch.tensor(values, dtype=dtype)


def make_trees(
    lengths: list[int], *, branches: int, num_drafts: int, page_size: int, num_pages: int, spine_tokens: int
) -> tuple[DevicePool, Trees]:
    """Spines of `lengths` tokens and room for `spine_tokens` more, no branches, on the CPU."""
    pool = DevicePool.full(num_pages, "cpu")
    width = -(-(max(lengths, default=0) + 40 * num_drafts + 40) // page_size)
    trees = Trees.empty(len(lengths), branches, num_drafts, page_size, width, "cpu")
    with reference():
        reserve(pool, trees, ints([length + spine_tokens for length in lengths]))
    return pool, trees


def random_outcomes(
    rng: random.Random, num_requests: int, num_drafts: int, num_candidates: int, vocab_size: int = 50
) -> tuple[torch.Tensor, torch.Tensor]:
    """Drafts [S, K] of random numbers, and distinct candidates [S, K + 1, C], where drafts are often among."""
    candidates = [
        [rng.sample(range(vocab_size), num_candidates) for _ in range(num_drafts + 1)] for _ in range(num_requests)
    ]
    drafts = []
    for of_request in candidates:
        named = rng.randint(0, num_drafts)
        drafts.append([rng.choice([*of_request[k], vocab_size]) if k < named else -1 for k in range(num_drafts)])
    shape = num_requests, num_drafts + 1, num_candidates
    return ints(drafts).reshape(num_requests, num_drafts), ints(candidates).reshape(shape)


def check_conservation(pool: DevicePool, trees: Trees, shared: int = 0, kept: torch.Tensor | None = None) -> None:
    """free + held = total; holders are exactly the spines and branches that name a page, and the cache of `kept` ones.

    shared: pages that more than one of them holds.
    """
    num_free = int(pool.num_free)
    free = pool.free[:num_free].long().cpu()
    spine = [table[:n] for table, n in zip(trees.page_tables.cpu(), trees.num_pages.tolist())]
    branch = trees.branch_pages[trees.branch_pages >= 0].cpu()
    held = torch.cat([*spine, branch] if kept is None else [*spine, branch, kept.cpu()]).long()
    holders = torch.bincount(held, minlength=len(pool.holders))
    assert torch.equal(holders, pool.holders.cpu().long())
    assert len(set(free.tolist())) == num_free
    assert num_free + int((holders > 0).sum()) == len(pool.holders)
    assert not (holders[free] > 0).any()
    assert int((holders > 1).sum()) == shared


def same_state(got: tuple[DevicePool, Trees], want: tuple[DevicePool, Trees]) -> None:
    """Equal up to the names of pages: on a GPU, programs that run at once get pages in any order."""
    for one, other in zip(_canonical(*got), _canonical(*want)):
        assert torch.equal(one, other)


def _canonical(pool: DevicePool, trees: Trees) -> list[torch.Tensor]:
    pool, trees = to(pool, "cpu"), to(trees, "cpu")
    num_pages = len(pool.holders)
    columns = torch.arange(trees.page_tables.shape[1])
    tables = trees.page_tables.masked_fill(columns >= trees.num_pages[:, None], -1)
    alive = trees.accept_lengths >= 0
    names = torch.full((num_pages + 1,), -1, dtype=torch.int64)
    fresh = 0
    for page in torch.cat([tables.flatten(), trees.branch_pages[alive].flatten()]).tolist():
        if page >= 0 and names[page] < 0:
            names[page], fresh = fresh, fresh + 1
    slots = trees.slots[alive]
    return [
        pool.num_free,
        pool.holders.sort().values,
        names[tables.long()],
        trees.num_pages,
        trees.accept_lengths,
        trees.first_tokens[alive],
        trees.bases[alive],
        names[trees.branch_pages.long()],
        names[slots // trees.page_size] * trees.page_size + slots % trees.page_size,
        trees.copy_lens,
        names[trees.copy_sources[trees.copy_lens > 0].long()],
    ]
