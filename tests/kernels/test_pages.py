"""reserve, expand, copy_pages and commit against their references; pages are conserved."""

from __future__ import annotations

import random

import pytest
import torch
from cases import DEVICE, check_conservation, ints, make_trees, random_outcomes, reference, same_state, to
from triton.runtime.interpreter import interpreter_builder

from vllm_ssd.kernels import (
    CLOSE,
    MISS,
    SKIP,
    DevicePool,
    Trees,
    adopt,
    commit,
    copy_pages,
    drop,
    expand,
    keep,
    reserve,
)


def run_both(
    op, pool: DevicePool, trees: Trees, *arguments: torch.Tensor, shared: int = 0, kept: torch.Tensor | None = None
) -> tuple[DevicePool, Trees]:
    """The state after the reference, which the kernel must have reached too; the given state stays as it is.

    Where requests compete for the last pages at once, who gets them is chance: then pages are counted alone.
    """
    on_device = to(pool, DEVICE), to(trees, DEVICE)
    op(*on_device, *(argument.to(DEVICE) for argument in arguments))
    pool, trees = to(pool, "cpu"), to(trees, "cpu")
    with reference():
        op(pool, trees, *arguments)
    if DEVICE == "cpu" or op is not expand or not compete(trees, *arguments[3:]):
        same_state(on_device, (pool, trees))
    check_conservation(*on_device, shared, kept)
    return pool, trees


def compete(trees: Trees, fan_out: torch.Tensor, forks: torch.Tensor) -> bool:
    """Whether several requests have branches to start, and there were too few pages for all of them."""
    wanted = [int(counts[begin:end].sum()) for counts, (begin, end) in zip(fan_out, forks.tolist())]
    return sum(n > 0 for n in wanted) > 1 and int((trees.accept_lengths >= 0).sum()) < sum(wanted)


EXPANSIONS = {
    # name: (committed lengths, fan-out of each accept length, page size, pages)
    "uniform": ([37, 5, 64], [[2, 2, 2, 2]] * 3, 16, 200),
    "ragged": ([37, 5, 64], [[5, 0, 3, 1], [0, 0, 0, 4], [1, 1, 0, 0]], 16, 200),
    "trunk of one token": ([1], [[3, 2, 1, 1]], 16, 40),
    "base on a page boundary": ([16, 32], [[2, 1, 1, 1]] * 2, 16, 60),
    "branches cross a page": ([14, 13, 15], [[2, 2, 2, 2]] * 3, 16, 100),
    "page smaller than a branch": ([7, 3], [[2, 1, 1, 2]] * 2, 2, 120),
    "odd page size": ([11, 20], [[1, 2, 3, 1]] * 2, 5, 100),
    "some idle": ([9, 30, 4], [[0, 0, 0, 0], [2, 2, 2, 2], [0, 0, 0, 0]], 16, 60),
    "pool runs out": ([9], [[3, 3, 2, 2]], 4, 14),
    "full pool": ([9], [[3, 3, 2, 2]], 4, 4),
    "empty batch": ([], [], 16, 8),
}


@pytest.mark.parametrize("name", EXPANSIONS)
def test_expand(name):
    lengths, fan_out, page_size, num_pages = EXPANSIONS[name]
    pool, trees = make_trees(
        lengths, branches=11, num_drafts=3, page_size=page_size, num_pages=num_pages, spine_tokens=3
    )
    drafts, candidates = random_outcomes(random.Random(name), len(lengths), 3, 7)
    fan_out = ints(fan_out).reshape(len(lengths), 4)
    forks = ints([[0, 4] if counts.any() else [0, 0] for counts in fan_out]).reshape(-1, 2)
    arguments = (ints(lengths), drafts, candidates, fan_out, forks)
    _, expanded = run_both(expand, pool, trees, *arguments)

    rows = int((expanded.accept_lengths >= 0).sum())
    assert rows == int(fan_out.sum()) or name in ("pool runs out", "full pool")
    assert rows > 0 or name in ("full pool", "empty batch")
    for r in range(len(lengths)):
        for k, token in zip(expanded.accept_lengths[r].tolist(), expanded.first_tokens[r].tolist()):
            assert k < 0 or token in candidates[r, k] and token not in drafts[r, k : k + 1]


def test_full_pool_serves_the_first_rows():
    """Six free pages and branches of two pages each: the likeliest three start, nothing leaks."""
    pool, trees = make_trees([15], branches=8, num_drafts=3, page_size=4, num_pages=11, spine_tokens=3)
    drafts, candidates = random_outcomes(random.Random(0), 1, 3, 7)
    fan_out = ints([[4, 2, 1, 1]])
    assert int(pool.num_free) == 6
    pool, trees = run_both(expand, pool, trees, ints([15]), drafts, candidates, fan_out, ints([[0, 4]]))
    assert int(pool.num_free) == 0
    assert trees.accept_lengths.tolist() == [[0, 0, 0, -1, -1, -1, -1, -1]]


@pytest.mark.skipif(DEVICE == "cuda", reason="the race is staged inside the interpreter")
@pytest.mark.parametrize("op", ("expand", "reserve"))
def test_a_claim_that_loses_a_race_is_made_again(op, monkeypatch):
    """Another program takes pages between the look at the counter and the exchange, twice."""
    pool, trees = make_trees([9], branches=8, num_drafts=3, page_size=4, num_pages=20, spine_tokens=3)
    stolen: list[int] = []
    exchange = interpreter_builder.create_atomic_cas

    def steal_first(*arguments):
        if len(stolen) < 4:
            stolen.extend(pool.free[int(pool.num_free) - 2 : int(pool.num_free)].tolist())
            pool.num_free.sub_(2)
        return exchange(*arguments)

    monkeypatch.setattr(interpreter_builder, "create_atomic_cas", steal_first)
    if op == "expand":
        drafts, candidates = random_outcomes(random.Random(0), 1, 3, 7)
        expand(pool, trees, ints([9]), drafts, candidates, ints([[4, 2, 1, 1]]), ints([[0, 4]]))
        assert trees.accept_lengths.tolist() == [[0, 0, 0, 0, 1, 1, -1, -1]]
    else:
        reserve(pool, trees, ints([50]))
        assert trees.num_pages.tolist() == [13]
    assert len(stolen) == 4
    pool.holders[torch.tensor(stolen)] += 1
    trees.page_tables[0, trees.num_pages[0] : trees.num_pages[0] + 4] = ints(stolen)
    trees.num_pages.add_(4)
    check_conservation(pool, trees)


def test_waves_make_the_same_tree_as_one_launch():
    """Fork points may start one after the other, as their candidates become known."""
    pool, trees = make_trees([37, 5], branches=11, num_drafts=3, page_size=16, num_pages=99, spine_tokens=3)
    drafts, candidates = random_outcomes(random.Random(1), 2, 3, 7)
    fan_out = ints([[3, 2, 2, 2], [4, 1, 0, 3]])
    arguments = (ints([37, 5]), drafts, candidates, fan_out)
    at_once = run_both(expand, pool, trees, *arguments, ints([[0, 4], [0, 4]]))
    first = run_both(expand, pool, trees, *arguments, ints([[0, 3], [0, 1]]))
    assert (first[1].copy_lens > 0).any()
    second = run_both(expand, *first, *arguments, ints([[3, 4], [1, 4]]))
    assert torch.equal(second[1].first_tokens, at_once[1].first_tokens)
    assert torch.equal(second[1].bases, at_once[1].bases)
    started = second[1].accept_lengths >= ints([[3], [1]])
    assert torch.equal(second[1].copy_lens, at_once[1].copy_lens.where(started, 0)), "a page would be copied twice"


def test_the_picture_in_the_docs():
    """docs/kernels.md draws this request through fork, hit and miss."""
    x, y, z = 30, 31, 32
    pool, trees = make_trees([9], branches=3, num_drafts=3, page_size=4, num_pages=10, spine_tokens=2)
    candidates = ints([[[x, 1], [y, 1], [z, 1], [2, 1]]])
    fan_out, forks = ints([[1, 1, 1, 0]]), ints([[0, 3]])
    assert pool.free[:7].tolist() == [9, 8, 7, 6, 5, 4, 3]
    forked = run_both(expand, pool, trees, ints([9]), ints([[40, 41, -1]]), candidates, fan_out, forks)
    assert forked[1].branch_pages.tolist() == [[[3, 4], [5, 6], [7, 8]]]
    assert forked[1].copy_sources.tolist() == [[2, 2, 2]] and forked[1].copy_lens.tolist() == [[1, 2, 3]]
    assert forked[1].slots[0, 1].tolist() == [22, 23, 24, 25]
    pool, trees = run_both(commit, *forked, ints([1]))
    assert trees.page_tables[0, :4].tolist() == [0, 1, 5, 6] and pool.free[:6].tolist() == [9, 3, 4, 7, 8, 2]
    pool, trees = run_both(commit, *forked, ints([MISS]))
    assert trees.page_tables[0, :3].tolist() == [0, 1, 2] and pool.free[:7].tolist() == [9, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("num_tokens", ([40, 0, 3], [1, 1, 1], [0, 0, 0], [400, 17, 1], []))
def test_reserve(num_tokens):
    pool, trees = make_trees([1] * len(num_tokens), branches=2, num_drafts=3, page_size=4, num_pages=20, spine_tokens=0)
    pool, trees = run_both(reserve, pool, trees, ints(num_tokens))
    assert trees.num_pages.tolist() == [max(-(-n // 4), 1) if n < 400 else 1 for n in num_tokens]


@pytest.mark.parametrize("num_pages", (1, 2, 140))
def test_pages_outlive_their_spine(num_pages):
    """Pages of the first spine are kept; two others begin with them; the first ends, then one of them is dropped."""
    pool, trees = make_trees([577, 0, 0], branches=2, num_drafts=3, page_size=4, num_pages=170, spine_tokens=0)
    pool, trees = to(pool, DEVICE), to(trees, DEVICE)
    kept = torch.full((170,), -1, dtype=torch.int32, device=DEVICE)
    columns, names = torch.arange(num_pages, device=DEVICE), torch.randperm(170, device=DEVICE)[:num_pages]
    first, both = torch.zeros_like(columns), torch.arange(1, 3, device=DEVICE).repeat_interleave(num_pages)
    held = trees.page_tables[0, :num_pages].clone()

    keep(pool, trees, kept, first, columns, names)
    check_conservation(pool, trees, num_pages, kept[names])
    assert torch.equal(kept[names], held)
    adopt(pool, trees, kept, both, columns.repeat(2), names.repeat(2))
    check_conservation(pool, trees, num_pages, kept[names])
    assert trees.num_pages.tolist() == [145, num_pages, num_pages]
    assert torch.equal(trees.page_tables[1:, :num_pages], held.expand(2, -1))
    assert (pool.holders[held.long()] == 4).all()

    commit(pool, trees, ints([CLOSE, SKIP, SKIP]).to(DEVICE))
    reserve(pool, trees, ints([0, 4 * num_pages + 9, 0]).to(DEVICE))
    check_conservation(pool, trees, num_pages, kept[names])
    assert torch.equal(trees.page_tables[1, :num_pages], held)
    commit(pool, trees, ints([SKIP, CLOSE, CLOSE]).to(DEVICE))
    check_conservation(pool, trees, 0, kept[names])
    assert int(pool.num_free) == 170 - num_pages

    drop(pool, kept, names[:1])
    check_conservation(pool, trees, 0, kept[names[1:]])
    adopt(pool, trees, kept, first[1:], columns[:-1], names[1:])
    check_conservation(pool, trees, num_pages - 1, kept[names[1:]])
    commit(pool, trees, ints([CLOSE, SKIP, SKIP]).to(DEVICE))
    drop(pool, kept, names[1:])
    assert int(pool.num_free) == 170 and not pool.holders.any()


def test_pages_are_added_after_those_that_a_spine_has():
    pool, trees = make_trees([12, 8], branches=2, num_drafts=3, page_size=4, num_pages=10, spine_tokens=0)
    pool, trees = to(pool, DEVICE), to(trees, DEVICE)
    kept = torch.zeros(10, dtype=torch.int32, device=DEVICE)
    two, one = (torch.tensor(values, device=DEVICE) for values in ([0, 0], [2]))
    keep(pool, trees, kept, two, torch.tensor([1, 2], device=DEVICE), torch.tensor([7, 3], device=DEVICE))
    commit(pool, trees, ints([CLOSE, SKIP]).to(DEVICE))
    adopt(pool, trees, kept, two[:1] + 1, one, torch.tensor([3], device=DEVICE))
    assert trees.num_pages.tolist() == [0, 3] and trees.page_tables[1, 2] == kept[3]
    check_conservation(pool, trees, 1, kept[[7, 3]])


def started_trees(page_size: int = 4) -> tuple[DevicePool, Trees]:
    lengths = [9, 15, 4]
    pool, trees = make_trees(lengths, branches=9, num_drafts=3, page_size=page_size, num_pages=150, spine_tokens=3)
    drafts, candidates = random_outcomes(random.Random(2), 3, 3, 7)
    fan_out = ints([[3, 2, 2, 2], [4, 1, 0, 3], [1, 1, 1, 1]])
    with reference():
        expand(pool, trees, ints(lengths), drafts, candidates, fan_out, ints([[0, 4]] * 3))
    return pool, trees


@pytest.mark.parametrize("page_size", (1, 4, 16))
@pytest.mark.parametrize("winners", ([0, 3, 2], [MISS, MISS, MISS], [CLOSE, 0, SKIP], [SKIP] * 3, [CLOSE] * 3))
def test_commit(winners, page_size):
    pool, before = started_trees(page_size)
    spine_pages, num_free = before.num_pages.clone(), int(pool.num_free)
    pool, trees = run_both(commit, pool, before, ints(winners))
    for r, winner in enumerate(winners):
        if winner >= 0:
            own = before.branch_pages[r, winner]
            own = own[own >= 0]
            first = int(before.bases[r, winner]) // page_size
            assert trees.num_pages[r] == first + len(own)
            assert torch.equal(trees.page_tables[r, first : first + len(own)], own)
        elif winner == MISS:
            assert trees.num_pages[r] == spine_pages[r]
        if winner != SKIP:
            assert (trees.branch_pages[r] == -1).all()
    if winners == [CLOSE] * 3:
        assert int(pool.num_free) == 150
    elif winners != [SKIP] * 3:
        assert int(pool.num_free) > num_free


def test_commit_leaves_pages_that_another_request_reads():
    pool, trees = started_trees()
    shared = trees.page_tables[0, :2].clone()
    with reference():
        commit(pool, trees, ints([SKIP, CLOSE, SKIP]))
    trees.page_tables[1, :2] = shared
    trees.num_pages[1] = 2
    pool.holders[shared.long()] += 1
    check_conservation(pool, trees, shared=2)
    on_device = to(pool, DEVICE), to(trees, DEVICE)
    commit(*on_device, ints([CLOSE, SKIP, SKIP]).to(DEVICE))
    check_conservation(*on_device)
    assert on_device[0].holders[shared.long()].tolist() == [1, 1]
    commit(*on_device, ints([SKIP, CLOSE, CLOSE]).to(DEVICE))
    assert int(on_device[0].num_free) == 150


def test_pages_are_conserved_over_a_thousand_rounds():
    """Random opens, forks, hits, misses and closes of two requests in a pool that is often too small; some pages are
    kept for the other request, until nobody else holds them and they are dropped.

    The kernels alone, checked after every round; every 50th round both the kernels and the references.
    """
    rng, num_drafts, page_size, requests = random.Random(3), 2, 3, 2
    pool, trees = make_trees([0] * requests, branches=5, num_drafts=2, page_size=3, num_pages=24, spine_tokens=0)
    pool, trees = to(pool, DEVICE), to(trees, DEVICE)
    lengths, seen, ran_out, most_shared, num_dropped = [0] * requests, set(), 0, 0, 0
    names, kept = torch.empty(0, dtype=torch.int64, device=DEVICE), torch.zeros(24, dtype=torch.int32, device=DEVICE)
    for round_number in range(1000):
        wanted = [length + num_drafts + 1 if length else rng.choice([0, rng.randint(1, 9)]) for length in lengths]
        reader = next((r for r in range(requests) if not trees.num_pages[r] and lengths[1 - r]), None)
        if reader is not None and wanted[reader]:
            num_shared = rng.randint(0, lengths[1 - reader] // page_size)
            wanted[reader] += num_shared * page_size
            columns = torch.arange(num_shared, device=DEVICE)
            slots, pages = torch.full_like(columns, reader), trees.page_tables[1 - reader, :num_shared]
            new = ~torch.isin(pages, kept[names])
            unused = torch.tensor(sorted(set(range(24)) - set(names.tolist())), device=DEVICE)[: int(new.sum())]
            keep(pool, trees, kept, 1 - slots[new], columns[new], unused)
            names = torch.cat([names, unused])
            if num_shared:
                adopt(pool, trees, kept, slots, columns, names[(pages[:, None] == kept[names]).int().argmax(1)])
        reserve(pool, trees, ints(wanted).to(DEVICE))
        room = (trees.num_pages * page_size).tolist()
        lengths = [
            (length or tokens) if room[r] >= tokens else 0 for r, (length, tokens) in enumerate(zip(lengths, wanted))
        ]
        drafts, candidates = random_outcomes(rng, requests, num_drafts, 4)
        fan_out = ints([[rng.randint(0, 2), rng.randint(0, 1), rng.randint(0, 2)] for _ in lengths])
        last_fork = [max(0, min(num_drafts, room[r] - length)) if length else -1 for r, length in enumerate(lengths)]
        forks = ints([[0, last + 1] for last in last_fork])
        arguments = (ints(lengths), drafts, candidates, fan_out, forks)
        if round_number % 50 == 0:
            run_both(expand, pool, trees, *arguments, shared=num_shared_pages(trees, kept[names]), kept=kept[names])
        expand(pool, trees, *(argument.to(DEVICE) for argument in arguments))
        accept_lengths = trees.accept_lengths.tolist()
        ran_out += sum(len(row) - row.count(-1) for row in accept_lengths) < sum(
            int(counts[:end].sum()) for counts, (_, end) in zip(fan_out, forks.tolist())
        )
        winners = []
        for r, length in enumerate(lengths):
            rows = [row for row, k in enumerate(accept_lengths[r]) if k >= 0]
            choices = ["hit", "hit", "miss", "skip"] * 4 + ["close"]
            choice = rng.choice(choices) if length and length < 40 else "close"
            if not length and not room[r]:
                choice = "miss"  # nothing is there
            elif choice == "skip" and rows:
                choice = "miss"  # rows must be empty before they are filled again
            elif choice == "hit" and not rows:
                choice = "miss"
            seen.add(choice)
            winner = rng.choice(rows) if choice == "hit" else {"miss": MISS, "skip": SKIP, "close": CLOSE}[choice]
            winners.append(winner)
            if choice == "hit":
                lengths[r] = length + accept_lengths[r][winner] + 1
            elif choice == "close":
                lengths[r] = 0
        if round_number % 50 == 0:
            pool_then, trees_then = to(pool, "cpu"), to(trees, "cpu")
            with reference():
                commit(pool_then, trees_then, ints(winners))
            now_shared = num_shared_pages(trees_then, kept[names])
            run_both(commit, pool, trees, ints(winners), shared=now_shared, kept=kept[names])
        commit(pool, trees, ints(winners).to(DEVICE))
        idle = names[(pool.holders[kept[names].long()] == 1)]
        if rng.random() < 0.9:
            drop(pool, kept, idle)
            names, num_dropped = names[~torch.isin(names, idle)], num_dropped + len(idle)
        now_shared = num_shared_pages(trees, kept[names])
        check_conservation(pool, trees, now_shared, kept[names])
        most_shared = max(most_shared, now_shared)
    assert seen == {"hit", "miss", "skip", "close"}
    assert ran_out > 20 and most_shared > 3 and num_dropped > 50


def num_shared_pages(trees: Trees, kept: torch.Tensor) -> int:
    """Pages that two of the spines and the cache hold."""
    one, other = (set(table[:n].tolist()) for table, n in zip(trees.page_tables, trees.num_pages.tolist()))
    return len((one & other) | ((one | other) & set(kept.tolist())))


@pytest.mark.parametrize("layout", ("slots outside heads", "heads outside slots", "keys beside values"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16, torch.uint8))
def test_copy_pages(dtype, layout):
    """Three layers at once; slots that are not filled, and pages not named, keep what they hold, NaN included."""
    num_pages, page_size, heads, head_size = 9, 5, 3, 24
    caches = []
    for _ in range(3):
        bits = torch.randint(0, 256, (num_pages, heads * page_size * head_size * 2, dtype.itemsize), dtype=torch.uint8)
        pages = bits.view(dtype).reshape(num_pages, heads * page_size * head_size * 2)
        if layout == "slots outside heads":
            views = pages.view(num_pages, 2, page_size, heads, head_size).unbind(1)
        elif layout == "heads outside slots":
            views = pages.view(num_pages, 2, heads, page_size, head_size).transpose(2, 3).unbind(1)
        else:
            views = pages.view(num_pages, heads, page_size, 2 * head_size).transpose(1, 2).split(head_size, -1)
        caches += views
    sources, destinations, num_slots = ints([0, 0, 4, -1, 2]), ints([1, 3, 5, -1, 8]), ints([2, 5, 1, 0, 4])
    storages = {cache.untyped_storage().data_ptr() for cache in caches}
    on_device = [cache.to(DEVICE) for cache in caches] if DEVICE == "cuda" else clone_views(caches)
    assert DEVICE == "cuda" or not storages & {cache.untyped_storage().data_ptr() for cache in on_device}
    copy_pages(on_device, sources.to(DEVICE), destinations.to(DEVICE), num_slots.to(DEVICE))
    with reference():
        copy_pages(caches, sources, destinations, num_slots)
    for cache, copied in zip(caches, on_device):
        assert torch.equal(cache.contiguous().view(torch.uint8), copied.cpu().contiguous().view(torch.uint8))


def clone_views(caches: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same views of a copy of each storage."""
    copies = {}
    for cache in caches:
        storage = cache.untyped_storage()
        copies.setdefault(storage.data_ptr(), storage.clone())
    views = []
    for cache in caches:
        copied = torch.empty(0, dtype=cache.dtype).set_(
            copies[cache.untyped_storage().data_ptr()], cache.storage_offset(), cache.size(), cache.stride()
        )
        views.append(copied)
    return views


def test_nothing_to_copy():
    cache = torch.zeros(4, 2, 1, 8, device=DEVICE)
    nothing = torch.empty(0, dtype=torch.int32, device=DEVICE)
    copy_pages([cache], nothing, nothing, nothing)
    assert not cache.any()


def test_layers_must_agree():
    caches = [torch.zeros(4, 2, 1, 8, device=DEVICE), torch.zeros(4, 2, 1, 16, device=DEVICE)]
    one = torch.ones(1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="shape, strides and dtype"):
        copy_pages(caches, one, one * 2, one)


def test_ops_on_some_requests():
    """By their slots, which is what a drafter launches: as the same call for all requests, with nothing for others."""
    lengths, slots = [37, 5, 64, 20, 9], [3, 0, 4]
    pool, trees = make_trees(lengths, branches=8, num_drafts=3, page_size=16, num_pages=200, spine_tokens=3)
    drafts, candidates = random_outcomes(random.Random(0), 5, 3, 7)
    fan_out = ints([[2, 2, 2, 2], [3, 1, 1, 1], [1, 1, 1, 1], [0, 3, 2, 0], [4, 0, 0, 1]])
    forks = ints([[0, 4], [0, 0], [0, 0], [1, 3], [0, 4]])
    by_slot = ints(slots)
    arguments = (ints(lengths), drafts, candidates, fan_out, forks)
    everywhere = run_both(expand, pool, trees, *arguments)
    expanded = run_both(expand, pool, trees, *(argument[slots] for argument in arguments), by_slot)
    same_state(expanded, everywhere)
    winners = ints([1, SKIP, SKIP, MISS, CLOSE])
    everywhere = run_both(commit, *expanded, winners)
    committed = run_both(commit, *expanded, winners[slots], by_slot)
    same_state(committed, everywhere)
    assert committed[1].num_pages.tolist()[4] == 0
    num_tokens = ints([90, 0, 0, 40, 61])
    everywhere = run_both(reserve, *committed, num_tokens)
    same_state(run_both(reserve, *committed, num_tokens[slots], by_slot), everywhere)
