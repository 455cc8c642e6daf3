"""Token trees of a draft model that draws all drafts of a branch in one forward, over masks in their places."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
from engine_target import K, Target, check_conservation, drive, grow, operate, reference_drafts, reference_jit_drafts
from fake_model import FakePagedModel
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ssd.drafter.server import build_engine
from vllm_ssd.drafter.vocabulary import VocabularyMap, translated
from vllm_ssd.link.protocol import JIT_TOKEN
from vllm_ssd.policy import FanOut

MASK = 4
"""A token that the texts of these tests have, too: to the model it is one like any other."""


@pytest.fixture(scope="module", params=[False, True], ids=["host pages", "device pages"])
def make_target(request: pytest.FixtureRequest) -> Callable[..., Target]:
    """Targets of a drafter with a mask token, whose pages are kept on the host or by the references of the kernels."""

    def make(num_pages: int = 400, max_model_len: int = 200, **options) -> Target:
        model = FakePagedModel(num_pages, max_model_len, tree_attention=request.param, mask_token_id=MASK)
        return Target(model, **options)

    return make


@pytest.mark.parametrize("num_drafts", [1, 2, K, 16])
def test_a_round_is_one_forward_of_spines_and_one_of_branches(make_target, num_drafts):
    target = make_target(num_speculative_tokens=num_drafts)
    target.open("a", [1, 2, 3, 4, 5])
    grow(target)
    assert target.model.num_forwards == 2
    for _ in range(3):
        (accept_length, bonus), following = max(target.blocks["a"].items())
        assert len(following) == num_drafts
        forwards = target.model.num_forwards
        target.advance("a", [*target.drafts["a"][:accept_length], bonus], following)
        grow(target)
        assert target.model.num_forwards == forwards + 2
        assert {k for k, _ in target.blocks["a"]} == set(range(num_drafts + 1))
        assert {len(drafts) for drafts in target.blocks["a"].values()} == {num_drafts}


def test_a_hit_keeps_the_bonus_token_and_overwrites_the_masks(make_target):
    target = make_target()
    target.open("a", [1, 2, 3, 4, 5])
    grow(target)
    (_, bonus), drafts = next(iter(target.blocks["a"].items()))
    assert drafts != reference_drafts(FakePagedModel(1), [1, 2, 3, 4, 5, bonus], K), "masks say what drafts would"
    target.advance("a", [bonus], drafts)
    sequence = target.engine.sequences["a"]
    assert sequence.computed == 6 and len(sequence.tokens) == 6 + K
    assert set(target.engine.branches.accept_length[sequence.rows]) == {0}, "what may follow the bonus token is known"
    grow(target)  # the model reads each draft where a mask was, or pushes other tokens than the reference
    assert sequence.is_computed


def test_pages_of_masks_are_not_shared(make_target):
    """What others adopt of a request that was hit ends before its uncomputed drafts."""
    target = make_target()
    prompt = [1, 2, 3, 5, 6, 7, 8]  # ends a token before its page does
    target.open("a", prompt)
    grow(target)
    (_, bonus), drafts = next(iter(target.blocks["a"].items()))
    target.advance("a", [bonus], drafts)
    target.advance("a", drafts[:2] + [MASK], [])
    text = [*prompt, bonus, *drafts[:2], MASK]
    target.open("b", text + [1, 1])
    assert target.engine.sequences["b"].computed <= 8
    grow(target)
    target.close("a")
    target.open("c", text + [1, 2])
    grow(target)
    assert set(target.blocks) == {"a", "b", "c"} and target.blocks["b"] and target.blocks["c"]


@pytest.mark.parametrize("num_drafts", [1, 2, K])
def test_just_in_time_drafts_take_one_forward_more(make_target, num_drafts):
    target = make_target()
    target.open("a", [1, 2, 3, 4])
    grow(target)
    missed = next(t for t in range(13) if (0, t) not in target.blocks["a"])
    forwards = target.model.num_forwards
    target.advance("a", [missed], [], jit=num_drafts)
    grow(target)
    assert target.model.num_forwards == forwards + min(num_drafts, 2)
    drafts = target.blocks["a"].pop((0, JIT_TOKEN))
    assert drafts == reference_jit_drafts(target.model, [1, 2, 3, 4, missed], num_drafts) and not target.blocks["a"]
    target.advance("a", [], drafts)
    grow(target)
    assert {k for k, _ in target.blocks["a"]} == set(range(num_drafts + 1))


def test_skipped_trimmed_and_foreign_rounds(make_target):
    target = make_target()
    target.open("a", [1, 2, 3])
    grow(target)
    (_, bonus), drafts = next(iter(target.blocks["a"].items()))
    target.advance("a", [bonus], drafts)  # nothing is forwarded before the next outcome comes
    target.advance("a", drafts[:1], drafts[1:])  # trimmed
    grow(target)
    target.advance("a", [*drafts[1:], 7, 8, 9], [])  # a skipped round
    grow(target)
    target.advance("a", [MASK], [MASK, MASK, 1])  # drafts by n-gram, masks among them
    grow(target)
    assert {k for k, _ in target.blocks["a"]} == set(range(K + 1))


@pytest.mark.parametrize("saguaro_c", [1.0, 0.2])
def test_each_draft_is_drawn_from_the_marginal_it_carries(make_target, saguaro_c):
    """Also where the next tree's candidates are weighed down: as many as the fan-out of the draft's own place."""
    target = make_target(num_speculative_tokens=5, saguaro_c=saguaro_c, fan_out=[2, 1, 2, 1, 2, 1], top_m=5)
    prompt = [1, 2, 3]
    target.engine.open("a", 1, np.array(prompt, np.int32), 4.0, 5)
    while target.engine.has_work:
        target.engine.speculate()
    branches, rows = target.engine.branches, target.engine.sequences["a"].rows
    seen = set()
    for row in rows.tolist():
        for place, fan_out in enumerate([2, 1, 2, 1, 2]):
            prefix = [*prompt, int(branches.tokens[row, 0]), *[MASK] * place]
            logits = target.model.reference_logits(prefix).numpy() / 4.0
            order = np.argsort(-logits)[:5]
            weights = np.exp(logits[order] - logits[order[0]])
            weights[:fan_out] *= saguaro_c
            assert branches.q_token_ids[row, place].tolist() == order.tolist()
            np.testing.assert_allclose(branches.q_probs[row, place], weights / weights.sum(), rtol=1e-4)
            assert branches.tokens[row, place + 1] in order
            seen.add(int((order == branches.tokens[row, place + 1]).argmax()))
    assert len(rows) and len(seen) > 1, "drafts are drawn, not chosen"


def test_drafts_of_one_branch_are_drawn_independently(make_target):
    """Two places whose marginals are alike agree as often as chance has it, and no more."""
    target = make_target(num_pages=2000, num_speculative_tokens=2, max_num_seqs=64, top_m=13)
    target.model.forward = _uniform(target.model)
    rounds, alike, total = 12, 0, 0
    for i in range(rounds):
        for j in range(32):
            target.engine.open(f"{i} {j}", 1, np.array([1, 2, j % 13], np.int32), 1.0, 2)
        while target.engine.has_work:
            target.engine.speculate()
        branches = target.engine.branches
        drafts = branches.tokens[np.flatnonzero(branches.alive), 1:3]
        alike, total = alike + int((drafts[:, 0] == drafts[:, 1]).sum()), total + len(drafts)
        for j in range(32):
            target.engine.close(f"{i} {j}")
    expected = total / 13
    assert total > 500 and abs(alike - expected) < 5 * np.sqrt(expected), (alike, expected)


def _uniform(model: FakePagedModel) -> Callable:
    forward = FakePagedModel.forward
    return lambda batch: forward(model, batch) * 0


def test_more_rows_than_one_step_has_room_for(make_target, monkeypatch):
    """The memory for logits holds those of two branches: a step takes so many, and all are grown."""
    from vllm_ssd.drafter import server

    monkeypatch.setattr(server, "max_rows", lambda *_: 2 * K)
    target = make_target()
    target.open("a", [1, 2, 3, 4])
    grow(target)
    (_, bonus), drafts = next(iter(target.blocks["a"].items()))
    target.advance("a", [bonus], drafts)
    most = 0
    forward = target.model.forward

    def counted(batch):
        nonlocal most
        most = max(most, len(batch.token_ids))
        return forward(batch)

    target.model.forward = counted
    target.step()  # beside the spine
    most = 0
    grow(target)
    assert most <= max(2 * K, 8) and target.blocks["a"]


@settings(max_examples=40, derandomize=True)
@given(data=st.data())
def test_random_operations_conserve_pages_and_read_the_right_prefix(make_target, data):
    num_pages = data.draw(st.sampled_from([24, 60, 300]))
    fan_out, num_drafts = data.draw(st.sampled_from([1, 2])), data.draw(st.sampled_from([1, 3, 5]))
    target = make_target(num_pages=num_pages, max_num_seqs=3, fan_out=fan_out, num_speculative_tokens=num_drafts)
    operate(target, data)
    assert target.engine.pages.num_free == num_pages


def test_pages_are_conserved_over_many_rounds(make_target):
    target = make_target(num_pages=40, max_model_len=120, max_num_seqs=3)
    target.engine._budget.observe_window = lambda seconds: None
    drive(target, random.Random(0), 150)
    assert target.engine.num_evictions > 5 and target.engine.num_steps > 150
    for request_id in list(target.engine.sequences):
        target.close(request_id)
    assert target.engine.pages.num_free == 40
    check_conservation(target.engine)


@pytest.mark.parametrize("tree_attention", [False, True])
def test_the_mask_is_the_draft_models_own_token(tree_attention):
    """Whatever the target calls its tokens, and though it has none for the mask."""
    model = FakePagedModel(100, tree_attention=tree_attention, mask_token_id=12)
    ids = np.arange(10, -1, -1, dtype=np.int32)  # of the target's 11 ids, in the reverse order
    ids[3] = 0
    shared = np.ones(11, bool)
    shared[3] = False
    served = translated(model, VocabularyMap(ids, shared))
    engine = build_engine(
        served,
        FanOut(K, 2),
        num_speculative_tokens=K,
        max_num_seqs=2,
        max_branches=2 * (K + 1),
        max_fan_out=2,
        top_m=5,
        seed=0,
        num_draftable=10,
    )
    prompt = [1, 2, 3, 10]
    engine.open("a", 1, np.array(prompt, np.int32), 0.0, K)
    while engine.has_work:
        engine.speculate()
    branches, rows = engine.branches, engine.sequences["a"].rows
    assert len(rows) == 2
    for row in rows.tolist():
        own = ids[[*prompt, branches.tokens[row, 0]]].tolist()
        for place in range(K):
            logits = model.reference_logits(own + [12] * place).numpy()[ids]
            logits[~shared] = -np.inf
            assert branches.tokens[row, place + 1] == logits.argmax()
