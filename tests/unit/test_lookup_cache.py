"""The blocks in device memory, against a dictionary of what was pushed."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from vllm_ssd.kernels import OUTCOME_COLUMNS, DeviceSpeculation, Found, lookup
from vllm_ssd.link.protocol import Push, SpeculationBlock, pack_ids
from vllm_ssd.target.v2.lookup_cache import SpeculationCache

SLOTS, N, K, M = 5, 6, 4, 5
PROBS = np.array([0.5, 0.2, 0.1, 0.1, 0.1], np.float32)


def make_cache() -> SpeculationCache:
    return SpeculationCache(SLOTS, N, K, M, "cpu")


def put(
    cache: SpeculationCache,
    slot: int,
    serial: int,
    length: int,
    offset: int,
    branches: dict[tuple[int, int], list[int]],
    sampled: bool = False,
    support: int = M,
) -> None:
    """Put branches {outcome: tokens from `offset` on}; the proposal of token t is t, t+1, …, as far as `PROBS` go."""
    drafts = np.array(list(branches.values()), np.int32)
    block = SpeculationBlock("r", 0, length, offset, pack_ids(list(branches)), pack_ids(drafts), sampled)
    push = Push([block], [], None)
    if sampled:
        q_token_ids = drafts[:, :, None] + np.arange(support, dtype=np.int32)
        q_probs = np.broadcast_to(PROBS[:support], q_token_ids.shape).astype("<f4")
        push = Push([block], [], None, support, pack_ids(q_token_ids), q_probs.tobytes())
    cache.put(push, [slot], [serial], [block], [0])


def look_up(
    cache: SpeculationCache,
    slot: int,
    serial: int,
    length: int,
    k: int,
    bonus: int,
    verifying: DeviceSpeculation | None = None,
    temperature: float = 0.0,
) -> tuple[bool, list[int]]:
    """Whether there is a block for the round, and the drafts after the outcome; `verifying` [SLOTS] becomes those."""
    outcomes = torch.zeros(1, OUTCOME_COLUMNS + K, dtype=torch.int32)
    lookup(
        cache.blocks,
        DeviceSpeculation.empty(SLOTS, K, M, "cpu") if verifying is None else verifying,
        torch.tensor([slot]),
        torch.tensor([k + 1], dtype=torch.int32),
        torch.full((SLOTS,), serial),
        torch.full((SLOTS,), length + k + 1, dtype=torch.int32),
        torch.full((SLOTS,), bonus),
        torch.full((SLOTS,), temperature),
        K,
        torch.zeros(1, 1 + K, dtype=torch.int64),
        outcomes,
    )
    _, _, found, _, num_drafts, _, *drafts = outcomes[0].tolist()
    return found != Found.LATE, drafts[:num_drafts]


def test_random_rounds_against_a_dictionary() -> None:
    rng, cache = random.Random(0), make_cache()
    serials, lengths = list(range(SLOTS)), [10] * SLOTS
    pushed: list[dict[tuple[int, int], list[int]]] = [{} for _ in range(SLOTS)]
    hits = partial = 0
    for step in range(3000):
        slot = rng.randrange(SLOTS)
        if rng.random() < 0.1:  # the slot goes to another request, which may be as long
            serials[slot], pushed[slot] = SLOTS + step, {}
        elif rng.random() < 0.3:
            lengths[slot], pushed[slot] = lengths[slot] + rng.randint(1, K + 1), {}
        branches = pushed[slot]
        depth = rng.choice([0, *(len(drafts) for drafts in branches.values())])
        if depth == 0:
            grown = {(rng.randrange(K), rng.randrange(5)): [] for _ in range(rng.randint(1, 4))}
            grown = {outcome: [] for outcome in grown if outcome not in branches}
            grown = dict(list(grown.items())[: N - len(branches)])
        else:
            grown = {outcome: drafts for outcome, drafts in branches.items() if len(drafts) == depth}
        size = rng.randint(1, K - depth) if depth < K else 0
        if grown and size:
            more = {outcome: [rng.randrange(50) for _ in range(size)] for outcome in grown}
            put(cache, slot, serials[slot], lengths[slot], depth, more)
            branches |= {outcome: grown[outcome] + more[outcome] for outcome in more}
            cache.flush()
        outcome = rng.randrange(K), rng.randrange(5)
        present, drafts = look_up(cache, slot, serials[slot], lengths[slot], *outcome)
        assert present == bool(branches)
        assert drafts == branches.get(outcome, [])
        hits, partial = hits + bool(drafts), partial + (0 < len(drafts) < K)
        assert look_up(cache, slot, serials[slot] + 1, lengths[slot], *outcome) == (False, [])
        assert look_up(cache, slot, serials[slot], lengths[slot] + 1, *outcome) == (False, [])
    assert hits > 300 and partial > 100


def test_branches_beyond_the_table_and_out_of_order_are_left_out() -> None:
    cache = make_cache()
    put(cache, 0, 1, 10, 0, {(0, token): [token] for token in range(N + 2)})
    put(cache, 0, 1, 10, 2, {(0, 0): [7]})  # nothing was pushed at depth 1
    cache.flush()
    assert look_up(cache, 0, 1, 10, 0, N - 1)[1] == [N - 1]
    assert look_up(cache, 0, 1, 10, 0, N)[1] == []
    assert look_up(cache, 0, 1, 10, 0, 0)[1] == [0]


def test_a_proposal_travels_with_its_draft() -> None:
    cache = make_cache()
    put(cache, 2, 1, 10, 0, {(0, 3): [11, 12], (1, 4): [21, 22]}, sampled=True)
    put(cache, 2, 1, 10, 2, {(1, 4): [23]}, sampled=True)
    cache.flush()
    found = DeviceSpeculation.empty(SLOTS, K, M, "cpu")
    _, drafts = look_up(cache, 2, 1, 10, 1, 4, found, temperature=0.7)
    assert drafts == [21, 22, 23]
    assert found.q_token_ids[2, :3].tolist() == [list(range(draft, draft + M)) for draft in drafts]
    torch.testing.assert_close(found.q_probs[2, :3], torch.tensor([[0.5, 0.2, 0.1, 0.1, 0.1]] * 3))


def test_a_narrow_proposal_leaves_nothing_of_a_wider_one() -> None:
    cache = make_cache()
    put(cache, 0, 1, 10, 0, {(0, 3): [11]}, sampled=True)
    put(cache, 0, 1, 12, 0, {(0, 3): [21]}, sampled=True, support=1)
    cache.flush()
    found = DeviceSpeculation.empty(SLOTS, K, M, "cpu")
    assert look_up(cache, 0, 1, 12, 0, 3, found, temperature=0.7)[1] == [21]
    assert found.q_probs[0, 0].tolist() == [0.5, *[0.0] * (M - 1)]


@pytest.mark.parametrize(
    ("k", "bonus", "expected"),
    [
        pytest.param(0, 30, [31, 32], id="all-cut-off"),
        pytest.param(1, 31, [32], id="one-verified"),
        pytest.param(2, 32, [], id="nothing-left"),
        pytest.param(1, 5, [55], id="another-token"),
        pytest.param(3, 0, [56], id="all-verified"),  # the entry beyond the last old draft is 0, and means nothing
        pytest.param(-1, 30, [], id="nothing-emitted"),
    ],
)
def test_the_rest_of_the_old_drafts(k: int, bonus: int, expected: list[int]) -> None:
    cache = make_cache()
    put(cache, 0, 1, 10, 0, {(1, 5): [55], (3, 0): [56]}, sampled=True)
    cache.flush()
    verifying = DeviceSpeculation.empty(SLOTS, K, M, "cpu")
    verifying.draft_token_ids[0, :3] = torch.tensor([30, 31, 32])
    verifying.q_token_ids[0] = torch.arange(K)[:, None]
    verifying.q_probs[0] = 1 / M
    verifying.num_drafts[0] = 3
    _, drafts = look_up(cache, 0, 1, 10, k, bonus, verifying, temperature=0.7)
    assert drafts == expected
    if expected[-1:] == [32]:
        assert verifying.q_token_ids[0, : len(drafts), 0].tolist() == list(range(3 - len(drafts), 3))


def test_a_block_that_is_being_written_is_not_read() -> None:
    cache = make_cache()
    put(cache, 0, 1, 10, 0, {(0, 5): [50]})
    cache.flush()
    cache.blocks.headers[0, :, 0] += 1  # as a writer does first
    assert look_up(cache, 0, 1, 10, 0, 5)[1] == []


def test_random_pushes_of_several_requests_against_a_dictionary() -> None:
    """Greedy and sampled ones, several pushes at once, branches in any order, blocks that are stale by now."""
    rng, cache = random.Random(1), make_cache()
    lengths, is_sampled = [10] * SLOTS, [True, False, True, True, True]
    pushed: list[dict[tuple[int, int], list[int]]] = [{} for _ in range(SLOTS)]
    hits = skipped = 0
    for _ in range(600):
        for _ in range(rng.randint(1, 2)):  # as from two drafters
            blocks, drafts_of, kept = [], [], []
            for slot in rng.sample(range(SLOTS), rng.randint(1, SLOTS)):
                if rng.random() < 0.4:
                    lengths[slot], pushed[slot] = lengths[slot] + 1, {}
                known = pushed[slot]
                depth = rng.choice([0, *map(len, known.values())])
                grown = [outcome for outcome, drafts in known.items() if depth and len(drafts) == depth]
                rng.shuffle(grown)
                if not depth:
                    outcomes = [(k, token) for k in range(K) for token in range(3) if (k, token) not in known]
                    grown = rng.sample(outcomes, rng.randint(0, min(3, N - len(known))))
                grown = grown[: rng.randint(1, N)]
                if not grown or depth == K:
                    continue
                size = rng.randint(1, K - depth)
                more = np.array([[rng.randrange(50) for _ in range(size)] for _ in grown], np.int32)
                packed = pack_ids(grown), pack_ids(more)
                blocks.append(SpeculationBlock("r", 0, lengths[slot], depth, *packed, is_sampled[slot]))
                drafts_of.append(more.flatten() if is_sampled[slot] else more[:0].flatten())
                kept.append(slot if rng.random() < 0.8 else None)
                for outcome, drafts in zip(grown, more.tolist()) if kept[-1] is not None else ():
                    known[outcome] = known.get(outcome, []) + drafts
            drafts = np.concatenate([*drafts_of, np.zeros(0, np.int32)])
            q_probs = np.broadcast_to(PROBS, (len(drafts), M)).astype("<f4")
            push = Push(blocks, [], None, M, pack_ids(drafts[:, None] + np.arange(M)), q_probs.tobytes())
            taken = [(slot, *pushed) for slot, pushed in zip(kept, push.each()) if slot is not None]
            skipped += len(kept) - len(taken)
            if taken:
                slots, blocks, _, firsts = map(list, zip(*taken))
                cache.put(push, slots, slots, blocks, firsts)
        cache.flush()
        for slot, known in enumerate(pushed):
            for outcome, drafts in known.items():
                found = DeviceSpeculation.empty(SLOTS, K, M, "cpu")
                temperature = 0.7 * is_sampled[slot]
                assert look_up(cache, slot, slot, lengths[slot], *outcome, found, temperature) == (True, drafts)
                if temperature:
                    expected = [list(range(draft, draft + M)) for draft in drafts]
                    assert found.q_token_ids[slot, : len(drafts)].tolist() == expected
                    assert (found.q_probs[slot, : len(drafts)] == torch.from_numpy(PROBS)).all()
                hits += 1
    assert hits > 1000 and skipped > 100


def test_branches_that_only_lengthen_are_not_searched_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, arranged = make_cache(), []
    arrange = SpeculationCache._arrange
    monkeypatch.setattr(SpeculationCache, "_arrange", lambda *args: arranged.append(args) or arrange(*args))
    outcomes = [(k, token) for k in range(2) for token in range(3)]
    for length in (10, 12):
        for offset in range(K):
            branches = {outcome: [offset + i] for i, outcome in enumerate(outcomes)}
            put(cache, 3, 1, length, offset, branches, sampled=True)
            cache.flush()
        assert look_up(cache, 3, 1, length, 1, 1, temperature=0.7)[1] == [4, 5, 6, 7]
    assert len(arranged) == 2, "once a round"


def test_lengthened_branches_against_a_dictionary() -> None:
    """A depth a push of all requests, but now and then others, in another order, too deep, again, or of a new round."""
    rng, cache = random.Random(2), make_cache()
    serials, lengths = list(range(SLOTS)), [10] * SLOTS
    known: list[dict[tuple[int, int], list[int]]] = [{} for _ in range(SLOTS)]
    held = [(-1, -1)] * SLOTS
    orders = [[(k, token) for k in range(2) for token in range(N // 2)] for _ in range(SLOTS)]
    offset = deep = ignored = 0
    for step in range(1500):
        pushed = offset
        if rng.random() < 0.15:
            pushed = max(offset + rng.choice((-1, 1)), 0)
        slots = list(range(SLOTS)) if rng.random() < 0.8 else rng.sample(range(SLOTS), rng.randint(1, SLOTS))
        for slot in slots:
            if rng.random() < 0.02:
                serials[slot] += SLOTS
            elif rng.random() < 0.02:
                lengths[slot] += 1
            if rng.random() < 0.03:
                rng.shuffle(orders[slot])
            elif rng.random() < 0.02:
                orders[slot][rng.randrange(N)] = 2, step
        blocks, drafts_of = [], []
        for slot in slots:
            drafts = np.array([[rng.randrange(50)] for _ in range(N)], np.int32)
            packed = pack_ids(orders[slot]), pack_ids(drafts)
            blocks.append(SpeculationBlock("r", 0, lengths[slot], pushed, *packed, True))
            drafts_of.append(drafts)
        drafts = np.concatenate(drafts_of)
        q_probs = np.broadcast_to(PROBS, (len(drafts), M)).astype("<f4")
        push = Push(blocks, [], None, M, pack_ids(drafts + np.arange(M)), q_probs.tobytes())
        cache.put(push, slots, [serials[slot] for slot in slots], blocks, [N * i for i in range(len(slots))])
        cache.flush()
        for slot, drafts in zip(slots, drafts_of):
            if held[slot] != (serials[slot], lengths[slot]):
                held[slot], known[slot] = (serials[slot], lengths[slot]), {}
            for outcome, (token,) in zip(orders[slot], drafts.tolist()):
                has_row = outcome in known[slot] or (not pushed and len(known[slot]) < N)
                if has_row and len(known[slot].get(outcome, [])) == pushed:
                    known[slot].setdefault(outcome, []).append(token)
                else:
                    ignored += 1
        offset = offset + 1 if pushed == offset else offset
        if offset == K:
            offset, lengths = 0, [length + 1 for length in lengths]
        slot = rng.randrange(SLOTS)
        for outcome in rng.sample(orders[slot], 2):
            expected = known[slot].get(outcome, [])
            found = DeviceSpeculation.empty(SLOTS, K, M, "cpu")
            assert look_up(cache, slot, *held[slot], *outcome, found, 0.7)[1] == expected
            ids = [list(range(draft, draft + M)) for draft in expected]
            assert found.q_token_ids[slot, : len(expected)].tolist() == ids
            deep += len(expected) == K
    assert deep > 100 and ignored > 1000
