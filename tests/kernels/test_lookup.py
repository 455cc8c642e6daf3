"""Outcomes against speculation blocks: hits, misses, stale and torn blocks, the rest of a trimmed speculation."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from cases import DEVICE, ints, reference, to

from vllm_ssd.kernels import Blocks, Found, Speculation, lookup

S, N, K = 5, 6, 3


def block(rng: random.Random, n: int, top_m: int, depth: int = K) -> tuple[torch.Tensor, ...]:
    """Outcomes [n, 2], depths, drafts and q of a block of `n` branches."""
    keys = rng.sample([(k, token) for k in range(K + 1) for token in range(9)], n)
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    return (
        ints(keys).reshape(n, 2),
        torch.full((n,), depth, dtype=torch.int32),
        torch.randint(0, 50, (n, depth), dtype=torch.int32, generator=generator),
        torch.randint(0, 50, (n, depth, top_m), dtype=torch.int32, generator=generator),
        torch.rand(n, depth, top_m, generator=generator),
    )


def speculation(rng: random.Random, rows: int, top_m: int) -> Speculation:
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    return Speculation(
        torch.randint(10, 20, (rows, K), dtype=torch.int32, generator=generator),
        torch.randint(0, 50, (rows, K, top_m), dtype=torch.int32, generator=generator),
        torch.rand(rows, K, top_m, generator=generator),
        ints([rng.randint(0, K) for _ in range(rows)]),
    )


def look_up(blocks: Blocks, queries: list[tuple[int, int, int, int, int]], old: Speculation) -> Found:
    """`queries` of (slot, epoch, length, accept length, bonus token); the kernel must agree with the reference."""
    columns = ints(queries, torch.int64).reshape(-1, 5).unbind(1)
    columns = [(column if i in (1, 2) else column.int()).contiguous() for i, column in enumerate(columns)]
    got = lookup(to(blocks, DEVICE), *(column.to(DEVICE) for column in columns), to(old, DEVICE))
    with reference():
        want = lookup(blocks, *columns, old)
    for one, other in zip(leaves(got), leaves(want)):
        assert torch.equal(one.cpu(), other)
    return want


def leaves(found: Found) -> list[torch.Tensor]:
    fields = [getattr(found.speculation, f.name) for f in dataclasses.fields(found.speculation)]
    return [found.hits, found.branches, *fields]


def nothing(rows: int, top_m: int) -> Speculation:
    old = speculation(random.Random(0), rows, top_m)
    return dataclasses.replace(old, num_drafts=torch.zeros(rows, dtype=torch.int32))


@pytest.mark.parametrize("top_m", (0, 1, 5))
def test_hits_and_misses(top_m):
    """Every outcome of some blocks, and the same with another epoch, length, request, accept length or token."""
    rng = random.Random(top_m)
    blocks = Blocks.empty(S, N, K, top_m, "cpu")
    blocks.write(0, 3, 40, *block(rng, N, top_m))
    blocks.write(1, 0, 7, *block(rng, 1, top_m))
    blocks.write(2, 1, 9, *block(rng, 4, top_m, depth=2))
    blocks.write(2, 1, 12, *block(rng, 5, top_m, depth=1))
    blocks.write(3, 1, 5, *block(rng, 0, top_m))
    right = [
        (slot, *blocks.headers[slot, half, 1:].tolist(), *outcome)
        for slot, half, row in (blocks.depths > 0).nonzero().tolist()
        for outcome in [blocks.outcomes[slot, half, row].tolist()]
    ]
    wrong = [tuple(x + (i == column) for i, x in enumerate(query)) for query in right for column in range(1, 5)]
    wrong += [((slot + 1) % S, *rest) for slot, *rest in right]
    found = look_up(blocks, right + wrong, nothing(len(right) + len(wrong), top_m))
    assert len(right) == 16 and found.hits[:16].all()
    assert all(query in right for query, hit in zip(right + wrong, found.hits.tolist()) if hit)
    assert set(found.speculation.num_drafts.tolist()) == {0, 1, 2, 3}
    look_up(blocks, right + wrong, speculation(rng, len(right) + len(wrong), top_m))


def test_a_deeper_block_of_the_same_round_wins():
    rng = random.Random(1)
    blocks = Blocks.empty(1, N, K, 2, "cpu")
    keys, _, drafts, q_token_ids, q_probs = block(rng, N, 2)
    for depth in (1, 2, 3):
        depths = torch.full((N,), depth, dtype=torch.int32)
        blocks.write(0, 0, 8, keys, depths, drafts[:, :depth], q_token_ids[:, :depth], q_probs[:, :depth])
        found = look_up(blocks, [(0, 0, 8, *keys[4].tolist())], nothing(1, 2))
        assert found.branches.tolist() == [4] and found.speculation.num_drafts.tolist() == [depth]
        assert torch.equal(found.speculation.draft_token_ids[0, :depth], drafts[4, :depth])
        assert torch.equal(found.speculation.q_probs[0, :depth], q_probs[4, :depth])


def test_the_previous_block_is_whole_while_the_next_is_written():
    """A write that stops anywhere leaves the block before it readable and itself invisible."""
    rng = random.Random(2)
    blocks = Blocks.empty(1, N, K, 2, "cpu")
    first, second = block(rng, N, 2), block(rng, N, 2)
    blocks.write(0, 0, 8, *first)
    blocks.write(0, 0, 8, *first)
    half = 1
    before = to(blocks, "cpu")
    blocks.write(0, 0, 8, *second)
    assert torch.equal(blocks.headers[0, 1 - half], before.headers[0, 1 - half]), "the newest whole block was touched"
    torn = to(blocks, "cpu")
    torn.headers[0, half, 0] -= 1  # as `write` leaves it until it is done
    key = next(key for key in second[0].tolist() if key not in first[0].tolist())
    assert not look_up(torn, [(0, 0, 8, *key)], nothing(1, 2)).hits.any()
    assert look_up(torn, [(0, 0, 8, *first[0][2].tolist())], nothing(1, 2)).branches.tolist() == [2]
    assert look_up(blocks, [(0, 0, 8, *key)], nothing(1, 2)).hits.all()


def test_a_block_that_is_overwritten_during_the_read_is_a_miss(monkeypatch):
    """The version moves between the two looks that the kernel takes at it."""
    if DEVICE == "cuda":
        pytest.skip("a writer is put inside the interpreted kernel; on a GPU nothing can be put there")
    import triton.language as tl

    rng = random.Random(3)
    blocks = Blocks.empty(1, N, K, 2, "cpu")
    written = block(rng, N, 2)
    blocks.write(0, 0, 8, *written)
    columns = [ints([0]), ints([0], torch.int64), ints([8], torch.int64), written[0][1, :1], written[0][1, 1:]]
    assert lookup(blocks, *columns, nothing(1, 2)).hits.all()

    def write_meanwhile() -> None:  # in place of a barrier, which means nothing in an interpreter
        blocks.write(0, 0, 9, *block(rng, N, 2))
        blocks.write(0, 0, 10, *block(rng, N, 2))

    monkeypatch.setattr(tl, "debug_barrier", write_meanwhile)
    found = lookup(blocks, *columns, nothing(1, 2))
    assert not found.hits.any() and found.branches.tolist() == [-1]
    assert found.speculation.draft_token_ids.tolist() == [[-1] * K]
    assert not found.speculation.q_probs.any()


def test_the_rest_of_a_trimmed_speculation_stands():
    """The scheduler cut the drafts after k and the target then emitted the very next one."""
    rng = random.Random(4)
    blocks = Blocks.empty(1, N, K, 2, "cpu")
    keys, *content = block(rng, N, 2)
    old = speculation(rng, 4, 2)
    old = dataclasses.replace(old, num_drafts=ints([3, 3, 2, 1]))
    keys[0] = ints([0, int(old.draft_token_ids[0, 0])])  # the block must not be asked
    blocks.write(0, 0, 8, keys, *content)
    queries = [(0, 0, 8, k, int(old.draft_token_ids[i, k])) for i, k in enumerate((0, 1, 1, 1))]
    found = look_up(blocks, queries, old)
    assert found.branches.tolist() == [N, N, N, -1]
    assert found.speculation.num_drafts.tolist() == [2, 1, 0, 0]
    assert found.hits.tolist() == [True, True, False, False]
    assert torch.equal(found.speculation.draft_token_ids[0, :2], old.draft_token_ids[0, 1:])
    assert torch.equal(found.speculation.q_probs[1, :1], old.q_probs[1, 2:])


def test_empty_batch():
    found = look_up(Blocks.empty(1, N, K, 2, "cpu"), [], nothing(0, 2))
    assert found.speculation.draft_token_ids.shape == (0, K)


def test_columns_of_a_wider_tensor_are_refused():
    wide = torch.zeros(2, 5, dtype=torch.int64, device=DEVICE)
    some = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    blocks = to(Blocks.empty(1, N, K, 2, "cpu"), DEVICE)
    with pytest.raises(ValueError, match="not contiguous"):
        lookup(blocks, some, wide[:, 1], wide[:, 2], some, some, to(nothing(2, 2), DEVICE))
