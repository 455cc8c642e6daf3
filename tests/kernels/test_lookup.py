"""Outcomes against speculation blocks: hits, misses, stale and torn blocks, the rest of a trimmed speculation."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch
from cases import DEVICE, ints, to
from lookup_cases import BLOCK_FIELDS, K, N, S, block, look_up, nothing, on_host, speculation, write

from vllm_ssd.kernels import OUTCOME_COLUMNS, DeviceBlocks, Found, lookup
from vllm_ssd.kernels import blocks as kernel_blocks

FILLER = 7
NUM_STORES = 4
"""Of a sampled request: the header around the branches and their proposals."""


@pytest.mark.parametrize("top_m", (0, 1, 5))
def test_hits_and_misses(top_m):
    """Every outcome of some blocks, and the same with another epoch, length, request, accept length or token."""
    rng = random.Random(top_m)
    blocks = DeviceBlocks.empty(S, N, K, top_m, "cpu")
    write(blocks, 0, 3, 40, *block(rng, N, top_m))
    write(blocks, 1, 0, 7, *block(rng, 1, top_m))
    write(blocks, 2, 1, 9, *block(rng, 4, top_m, depth=2))
    write(blocks, 2, 1, 12, *block(rng, 5, top_m, depth=1))
    write(blocks, 3, 1, 5, *block(rng, 0, top_m))
    right = [
        (slot, *blocks.headers[slot, half, 1:].tolist(), *outcome)
        for slot, half, row in (blocks.depths > 0).nonzero().tolist()
        for outcome in [blocks.outcomes[slot, half, row].tolist()]
    ]
    wrong = [tuple(x + (i == column) for i, x in enumerate(query)) for query in right for column in range(1, 5)]
    wrong += [((slot + 1) % S, *rest) for slot, *rest in right]
    temperature = 0.7 if top_m else 0.0
    queries = right + wrong
    found = look_up(blocks, queries, nothing(len(queries), top_m), temperature=temperature)
    assert len(right) == 16 and found.found[:16] == [Found.HIT] * 16
    for query, status in zip(queries, found.found):
        answered = any(
            (slot, *header[1:]) == query[:3] for slot in range(S) for header in blocks.headers[slot].tolist()
        )
        assert (status == Found.HIT) == (query in right) and (status == Found.LATE) == (not answered)
    assert set(found.num_drafts) == {0, 1, 2, 3}
    look_up(blocks, queries, speculation(rng, len(queries), top_m), temperature=temperature, wanted=2)


def test_a_deeper_block_of_the_same_round_wins():
    rng = random.Random(1)
    blocks = DeviceBlocks.empty(1, N, K, 2, "cpu")
    keys, _, drafts, q_token_ids, q_probs = block(rng, N, 2)
    for depth in (1, 2, 3):
        depths = torch.full((N,), depth, dtype=torch.int32)
        write(blocks, 0, 0, 8, keys, depths, drafts[:, :depth], q_token_ids[:, :depth], q_probs[:, :depth])
        found = look_up(blocks, [(0, 0, 8, *keys[4].tolist())], nothing(1, 2))
        assert found.branches == [4] and found.drafts == [drafts[4, :depth].tolist()]
        assert torch.equal(found.q_probs[0, :depth], q_probs[4, :depth])


class Stopped(Exception):
    """A writer that goes no further."""


@pytest.mark.parametrize("num_stores", range(NUM_STORES))
@pytest.mark.parametrize("num_before", (1, 2))
def test_a_write_that_stops_anywhere_leaves_the_block_before_it(monkeypatch, num_before, num_stores):
    """The newest whole block stays readable and is not touched, the torn one is invisible."""
    rng = random.Random(2)
    blocks = DeviceBlocks.empty(1, N, K, 2, "cpu")
    first, second = block(rng, N, 2), block(rng, N, 2)
    for _ in range(num_before):
        write(blocks, 0, 0, 8, *first)
    newest = int(blocks.headers[0, :, 0].argmax())
    before = to(blocks, "cpu")
    store, stores = kernel_blocks._store, []

    def stop(*arguments):
        if len(stores) == num_stores:
            raise Stopped
        stores.append(arguments)
        store(*arguments)

    monkeypatch.setattr(kernel_blocks, "_store", stop)
    with pytest.raises(Stopped):
        write(blocks, 0, 0, 8, *second)
    for field in BLOCK_FIELDS:
        assert torch.equal(getattr(blocks, field)[0, newest], getattr(before, field)[0, newest]), field
    key = next(key for key in second[0].tolist() if key not in first[0].tolist())
    assert look_up(blocks, [(0, 0, 8, *key)], nothing(1, 2)).found == [Found.MISS]
    assert look_up(blocks, [(0, 0, 8, *first[0][2].tolist())], nothing(1, 2)).branches == [2]


def test_a_reader_between_any_two_stores_sees_whole_blocks(monkeypatch):
    """Random writes to several requests at once; after every store, whatever is found was written as a whole."""
    rng = random.Random(4)
    blocks = DeviceBlocks.empty(S, N, K, 2, "cpu")
    newest: list[tuple | None] = [None] * S
    writing: dict[int, tuple] = {}
    store, num_reads = kernel_blocks._store, [0, 0]

    def check() -> None:
        for slot in range(S):
            seen = [written for written in (newest[slot], writing.get(slot)) if written is not None]
            for epoch, length, (keys, _, drafts, _, _) in seen:
                row = rng.randrange(N)
                found = look_up(blocks, [(slot, epoch, length, *keys[row].tolist())], nothing(1, 2))
                num_reads[found.found[0] == Found.HIT] += 1
                same_round = [w for w in seen if w[:2] == (epoch, length)]
                if found.found[0] == Found.HIT:
                    assert any(
                        found.drafts[0] == drafts[i].tolist()
                        for _, _, (keys_, _, drafts, _, _) in same_round
                        for i in range(N)
                        if keys_[i].tolist() == keys[row].tolist()
                    )

    def store_and_read(*arguments):
        store(*arguments)
        check()

    monkeypatch.setattr(kernel_blocks, "_store", store_and_read)
    for number in range(12):
        slots = sorted(rng.sample(range(S), rng.randint(1, S)))
        writing = {slot: (rng.randrange(2), 10 + number // 2, block(rng, N, 2)) for slot in slots}
        contents = [[w[2][i] for w in writing.values()] for i in range(5)]
        blocks.write(
            np.array(slots),
            np.array([w[:2] for w in writing.values()]),
            on_host(blocks, list(zip(*contents[:3]))),
            np.zeros(len(slots), bool),
            (N * K * np.array(slots)[:, None] + np.arange(N * K)).flatten(),
            np.array(slots).repeat(N * K),
            *([value.numpy() for value in values] for values in contents[3:]),
        )
        for slot, written in writing.items():
            newest[slot] = written
        writing = {}
        for slot in slots:
            epoch, length, (keys, _, drafts, _, _) = newest[slot]
            found = look_up(blocks, [(slot, epoch, length, *keys[1].tolist())], nothing(1, 2))
            assert found.drafts == [drafts[1].tolist()], "the block that was just written is the one that is read"
    assert min(num_reads) > 20, "neither hits nor misses alone prove anything"


def test_the_stores_of_a_write_are_as_many_as_are_stopped_at(monkeypatch):
    stores = []
    monkeypatch.setattr(kernel_blocks, "_store", lambda *arguments: stores.append(arguments[0]))
    blocks = DeviceBlocks.empty(1, N, K, 2, "cpu")
    write(blocks, 0, 0, 8, *block(random.Random(0), N, 2))
    assert len(stores) == NUM_STORES
    assert stores[0].data_ptr() == stores[-1].data_ptr() == blocks.headers.data_ptr()


@pytest.mark.parametrize("has_ngram", (False, True))
@pytest.mark.parametrize("temperature", (0.0, 1.0))
def test_a_block_that_is_overwritten_during_the_read_is_a_miss(monkeypatch, temperature, has_ngram):
    """The version moves between the two looks that the kernel takes at it."""
    if DEVICE == "cuda":
        pytest.skip("a writer is put inside the interpreted kernel; on a GPU nothing can be put there")
    import triton.language as tl

    rng = random.Random(3)
    blocks = DeviceBlocks.empty(1, N, K, 2, "cpu")
    written = block(rng, N, 2, depth=2)
    write(blocks, 0, 0, 8, *written)
    k, token = written[0][1].tolist()
    num_sampled, found = k + 1, written[2][1].tolist()
    ngram = torch.tensor([[*found, 42]]) if has_ngram else None
    drafts, outcomes = torch.zeros(1, 1 + K, dtype=torch.int64), torch.zeros(1, OUTCOME_COLUMNS + K, dtype=torch.int32)
    columns = [ints([0], torch.int64), ints([num_sampled]), ints([0], torch.int64), ints([8 + num_sampled])]
    columns += [ints([token], torch.int64), torch.tensor([temperature])]

    def status() -> list[int]:
        verifying = nothing(1, 2)
        lookup(blocks, verifying, *columns, K, drafts, outcomes, ngram)
        assert verifying.num_drafts.tolist() == drafts[:, 0].tolist()
        if has_ngram and temperature and outcomes[0, 5] == 0:
            assert verifying.q_token_ids[0, :, 0].tolist() == ngram[0].tolist()
            assert verifying.q_probs[0].tolist() == [[1, 0]] * K
        return outcomes[0, 2:].tolist()

    assert status() == [Found.HIT, 1, *((K, 2, *found, 42) if has_ngram else (2, 2, *found, -1))]

    def write_meanwhile() -> None:  # in place of a barrier, which means nothing in an interpreter
        write(blocks, 0, 0, 9, *block(rng, N, 2))
        write(blocks, 0, 0, 10, *block(rng, N, 2))

    monkeypatch.setattr(tl, "debug_barrier", write_meanwhile)
    if has_ngram:
        assert status() == [Found.MISS, -1, K, 0, *found, 42]
    else:
        assert status() == [Found.MISS, -1, 0, 0, *[-1] * K]
        assert drafts.tolist() == [[0, *[token] * K]]


@pytest.mark.parametrize("top_m", (2, 300))  # the kernel moves q in pieces
def test_the_rest_of_a_trimmed_speculation_stands(top_m):
    """The scheduler cut the drafts after k and the target then emitted the very next one."""
    rng = random.Random(4)
    blocks = DeviceBlocks.empty(1, N, K, top_m, "cpu")
    keys, *content = block(rng, N, top_m)
    old = speculation(rng, 4, top_m)
    old = dataclasses.replace(old, num_drafts=ints([3, 3, 2, 1]))
    keys[0] = ints([0, int(old.draft_token_ids[0, 0])])  # the block must not be asked
    write(blocks, 0, 0, 8, keys, *content)
    queries = [(0, 0, 8, k, int(old.draft_token_ids[i, k])) for i, k in enumerate((0, 1, 1, 1))]
    found = look_up(blocks, queries, old)
    assert found.branches == [N, N, -1, -1]
    assert found.num_drafts == [2, 1, 0, 0]
    assert found.found == [Found.HIT, Found.HIT, Found.MISS, Found.MISS]
    assert found.drafts[0] == old.draft_token_ids[0, 1:].tolist()
    assert torch.equal(found.q_probs[0, :2], old.q_probs[0, 1:])
    assert torch.equal(found.q_token_ids[1, :1], old.q_token_ids[1, 2:])


@pytest.mark.parametrize("wanted", range(K + 2))
def test_no_more_drafts_than_wanted(wanted):
    rng = random.Random(5)
    blocks = DeviceBlocks.empty(1, N, K, 2, "cpu")
    written = block(rng, N, 2)
    write(blocks, 0, 0, 8, *written)
    found = look_up(blocks, [(0, 0, 8, *written[0][3].tolist())], nothing(1, 2), wanted=wanted)
    assert found.drafts == [written[2][3, :wanted].tolist()] and found.found == [Found.HIT]


def test_a_prompt_that_goes_on_gets_no_drafts():
    """Nothing was emitted: neither the block, nor the old drafts, nor n-grams speak."""
    rng = random.Random(6)
    blocks = DeviceBlocks.empty(1, N, K, 2, "cpu")
    keys, *content = block(rng, N, 2)
    keys[0] = ints([-1, FILLER])
    write(blocks, 0, 0, 8, keys, *content)
    old = dataclasses.replace(speculation(rng, 1, 2), num_drafts=ints([K]))
    for ngram in (None, torch.full((1, K), 5)):
        found = look_up(blocks, [(0, 0, 8, -1, FILLER)], old, ngram=ngram)
        assert found.num_drafts == [0] and found.branches == [-1]


def test_a_greedy_request_leaves_q_alone():
    rng = random.Random(7)
    blocks = DeviceBlocks.empty(1, N, K, 2, "cpu")
    written = block(rng, N, 2)
    write(blocks, 0, 0, 8, *written)
    old = nothing(1, 2)
    found = look_up(blocks, [(0, 0, 8, *written[0][0].tolist())], old, temperature=0.0)
    assert found.found == [Found.HIT]
    assert torch.equal(found.q_probs, old.q_probs) and torch.equal(found.q_token_ids, old.q_token_ids)


@pytest.mark.parametrize("top_m", (0, 2))
def test_drafts_without_q_are_none_where_requests_sample(top_m):
    rng = random.Random(8)
    blocks = DeviceBlocks.empty(1, N, K, top_m, "cpu")
    keys, depths, drafts, q_token_ids, q_probs = block(rng, N, top_m)
    write(blocks, 0, 0, 8, keys, depths, drafts, q_token_ids, 0 * q_probs)
    queries = [(0, 0, 8, *keys[0].tolist())]
    assert look_up(blocks, queries, nothing(1, top_m)).found == [Found.MISS]
    assert look_up(blocks, queries, nothing(1, top_m), temperature=0.0).found == [Found.HIT]


@pytest.mark.parametrize(("top_m", "temperature"), [(0, 0.0), (2, 0.0), (2, 0.7), (300, 0.7)])
@pytest.mark.parametrize("wanted", (0, 2, K))
def test_ngram_drafts_where_there_are_no_others(top_m, temperature, wanted):
    rng = random.Random(9)
    blocks = DeviceBlocks.empty(1, N, K, top_m, "cpu")
    written = block(rng, N, top_m)
    write(blocks, 0, 0, 8, *written)
    hit = (0, 0, 8, *written[0][2].tolist())
    ngram = torch.tensor([[40, 41, 42], [43, 44, 45]])
    found = look_up(
        blocks, [hit, (0, 0, 9, 0, 1)], nothing(2, top_m), temperature=temperature, wanted=wanted, ngram=ngram
    )
    assert found.found == [Found.HIT, Found.LATE] and found.branches == [2, -1]
    assert found.drafts == [written[2][2, :wanted].tolist(), ngram[1, :wanted].tolist()]
    assert found.num_drafted == [wanted, 0]
    if temperature and wanted:
        assert found.q_token_ids[1, :wanted, 0].tolist() == ngram[1, :wanted].tolist()
        assert found.q_probs[1, :wanted].sum(1).tolist() == [1] * wanted == found.q_probs[1, :wanted, 0].tolist()


@pytest.mark.parametrize(("top_m", "temperature"), [(0, 0.0), (2, 0.0), (2, 0.7), (300, 0.7)])
@pytest.mark.parametrize("wanted", range(K + 1))
def test_ngram_drafts_go_on_after_drafts_that_they_agree_with(top_m, temperature, wanted):
    """Hits in a block and rests of old drafts, short and not; n-gram drafts agree with all, some or none of them."""
    rng = random.Random(10)
    blocks = DeviceBlocks.empty(1, N, K, top_m, "cpu")
    keys, depths, drafts, q_token_ids, q_probs = block(rng, N, top_m)
    depths[:5] = ints([1, 2, 2, 2, 1])
    write(blocks, 0, 0, 8, keys, depths, drafts, q_token_ids, q_probs)
    old = speculation(rng, 10, top_m)
    old.num_drafts[:] = ints([0] * N + [K] * 4)
    queries = [(0, 0, 8, *key) for key in keys.tolist()]
    queries += [(0, 0, 8, k, int(old.draft_token_ids[N + i, k])) for i, k in enumerate((0, 0, 1, 1))]
    own = [(drafts[i, :depth], q_token_ids[i], q_probs[i]) for i, depth in enumerate(depths.tolist())]
    for i, k in enumerate((0, 0, 1, 1), start=N):
        own.append((old.draft_token_ids[i, k + 1 :], old.q_token_ids[i, k + 1 :], old.q_probs[i, k + 1 :]))
    ngram = torch.tensor([[100 + i, 110 + i, 120 + i] for i in range(10)])
    for i, num_alike in enumerate((1, 2, 1, 0, 0, K, 2, 1, 1, 0)):
        ngram[i, :num_alike] = own[i][0][:num_alike]
    ngram[3, 1] = own[3][0][1]  # the second alone is alike
    found = look_up(blocks, queries, old, temperature=temperature, wanted=wanted, ngram=ngram)
    expected = [of_row[0].tolist()[:wanted] for of_row in own]
    goes_on = [i for i in (0, 1, 6, 8) if len(expected[i]) < wanted]
    assert len(goes_on) == (0, 0, 2, 4)[wanted]
    assert found.found == [Found.HIT] * 10 and found.branches == [*range(N), *[N] * 4]
    assert found.num_drafted == [len(of_row) for of_row in expected]
    for i, (n, (_, ids, probs)) in enumerate(zip(found.num_drafted, own)):
        if i in goes_on:
            expected[i] += ngram[i, n:wanted].tolist()
        if temperature:
            assert torch.equal(found.q_token_ids[i, :n], ids[:n]) and torch.equal(found.q_probs[i, :n], probs[:n])
            assert found.q_token_ids[i, n : found.num_drafts[i], 0].tolist() == expected[i][n:]
            assert (found.q_probs[i, n : found.num_drafts[i]] == (torch.arange(top_m) == 0)).all()
    assert found.drafts == expected


def test_empty_batch():
    assert look_up(DeviceBlocks.empty(1, N, K, 2, "cpu"), [], nothing(0, 2)).drafts == []


def test_columns_of_a_wider_tensor_are_refused():
    wide = torch.zeros(2, 5, dtype=torch.int64, device=DEVICE)
    some = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    blocks = to(DeviceBlocks.empty(2, N, K, 2, "cpu"), DEVICE)
    drafts, outcomes = (
        wide[:, : 1 + K].contiguous(),
        torch.zeros(2, OUTCOME_COLUMNS + K, dtype=torch.int32, device=DEVICE),
    )
    for slots, rows in ((wide[:, 1], drafts), (wide[:, 1].contiguous(), wide[:, 1:])):
        with pytest.raises(ValueError, match="not contiguous"):
            lookup(
                blocks,
                to(nothing(2, 2), DEVICE),
                slots,
                some,
                some.long(),
                some,
                some.long(),
                some.float(),
                K,
                rows,
                outcomes,
            )
