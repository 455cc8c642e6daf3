"""What branches are drawn from, and when it is pushed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_target import K, grow

from vllm_ssd.drafter import device_steps
from vllm_ssd.drafter.biases import NUM_BIASES, UNBIASED, Biases, dense_bias
from vllm_ssd.drafter.sampler import Sampler
from vllm_ssd.link.protocol import MAX_ALLOWED_ID, MAX_BIASED, NO_BIAS, Bias, Truncation, pack_bias


def test_sampled_branches_carry_the_distribution_they_were_drawn_from(make_target):
    target = make_target()
    target.open("a", [1, 2, 3], temperature=0.8)
    grow(target)
    assert [len(drafts) for drafts in target.blocks["a"].values()] == [K, K]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_every_step_is_pushed_while_the_next_ones_run(make_target, monkeypatch, temperature):
    """On the device, a step is launched when the one before it is done, before the host looks at what that drew."""
    order: list[tuple[str, int]] = []
    for name in ("launch", "wait", "drawn"):
        original = getattr(device_steps._Buffers, name)

        def logged(self, step, *arguments, name=name, original=original):
            order.append((name, step))
            return original(self, step, *arguments)

        monkeypatch.setattr(device_steps._Buffers, name, logged)
    target = make_target()
    target.open("a", [1, 2, 3, 4, 5], temperature)
    target.step()
    order.clear()
    for depth in range(1, K + 1):
        target.step()
        assert {len(drafts) for drafts in target.blocks["a"].values()} == {depth}
    target.step()
    assert not target.engine.has_work
    if target.model.tree_attention:
        launched = [("launch", 0)]
        for step in range(K):
            launched += [("wait", step), ("launch", step + 1), ("drawn", step)]
        assert order == [*launched, ("wait", K), ("drawn", K)]


@pytest.mark.parametrize("num_polls", [0, 3])
def test_an_outcome_waits_for_one_step_at_most(make_target, monkeypatch, num_polls):
    """While a step runs, the target is listened to again and again, and no further one is launched."""
    target = make_target()
    if not target.model.tree_attention:
        return  # nothing runs while nobody waits for it
    target.open("a", [1, 2, 3, 4, 5])
    target.step()
    launched = []
    launch = device_steps._Buffers.launch
    monkeypatch.setattr(
        device_steps._Buffers, "launch", lambda self, step, *rest: (launched.append(step), launch(self, step, *rest))
    )
    monkeypatch.setattr(device_steps._Buffers, "is_drawn", lambda self, step, timeout_s: False)
    for _ in range(num_polls):
        assert target.engine.speculate() is None and launched == [0]
    target.advance("a", [7], [])
    assert len(launched) <= 1
    monkeypatch.undo()
    grow(target)
    assert target.blocks["a"]


def test_predicted_bonus_tokens_are_proposed_less_and_q_says_so():
    logits = torch.tensor([2.0, 0.5, 1.0, -1.0, 0.0]).repeat(40_000, 1)
    draw = Sampler(num_candidates=3, top_m=4, seed=0, saguaro_c=0.25).draw(
        logits, np.full(len(logits), 0.8, np.float32), np.full(len(logits), 2)
    )
    assert draw.q_token_ids[0].tolist() == [0, 2, 1, 4]
    weights = torch.exp(logits[0, [0, 2, 1, 4]] / 0.8) * torch.tensor([0.25, 0.25, 1, 1])
    expected = (weights / weights.sum()).numpy()
    np.testing.assert_allclose(draw.q_probs, np.broadcast_to(expected, draw.q_probs.shape), rtol=1e-5)
    seen = np.bincount(draw.drawn, minlength=5)[[0, 2, 1, 4]]
    chi_square = ((seen - len(logits) * expected) ** 2 / (len(logits) * expected)).sum()
    assert seen.sum() == len(logits) and chi_square < 25  # 3 degrees of freedom: 1.5e-5


@pytest.mark.parametrize("saguaro_c", [1.0, 0.2])
def test_branches_down_weight_what_the_next_tree_predicts(make_target, saguaro_c):
    """Two branches a fork point: their proposals have the two likeliest tokens down-weighted, and no others."""
    target = make_target(max_num_seqs=2, saguaro_c=saguaro_c)
    engine = target.engine
    prompt = [1, 2, 3]
    engine.open("sampled", 1, np.array(prompt, np.int32), 1.0, 3)
    engine.open("greedy", 1, np.array(prompt, np.int32), 0.0, 3)
    while engine.has_work:
        engine.speculate()
    branches, sequence = engine.branches, engine.sequences["sampled"]
    for row in sequence.rows:
        for depth in range(3):
            logits = target.model.reference_logits(prompt + branches.tokens[row, : depth + 1].tolist()).float()
            values, ids = torch.topk(logits, 5)
            weights = torch.exp(values - values[0]) * torch.tensor([saguaro_c] * 2 + [1.0] * 3)
            assert branches.q_token_ids[row, depth].tolist() == ids.tolist()
            np.testing.assert_allclose(branches.q_probs[row, depth], weights / weights.sum(), rtol=1e-4)
    assert len(sequence.rows) and len(engine.sequences["greedy"].rows)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_branches_are_drawn_from_what_the_request_prefers(make_target, temperature):
    """`Target` compares each draft and q with the biased logits; the request beside it has none."""
    target = make_target(top_m=13, max_fan_out=3, fan_out=3, max_branches=3 * (K + 1))
    allowed = [2, 5, 7]
    biased = Truncation(bias=pack_bias(allowed, {5: 3.5}))
    for name, truncation in (("a", biased), ("b", Truncation(bias=pack_bias([], {4: 90.0}))), ("c", Truncation())):
        target.open(name, [1, 2, 3, 4, 5], temperature, truncation)
    for _ in range(3):
        grow(target)
        blocks = {name: dict(target.blocks[name]) for name in "abc"}
        assert all(any(drafts for drafts in block.values()) for block in blocks.values()), "inconclusive: no drafts"
        assert {token for drafts in blocks["a"].values() for token in drafts} <= {*allowed}
        assert {bonus for _, bonus in blocks["a"]} <= {*allowed}, "a branch for an outcome that cannot be"
        assert {token for drafts in blocks["b"].values() for token in drafts} == {4}
        for name, block in blocks.items():
            (accept_length, bonus), drafts = next(iter(block.items()))
            target.advance(name, [*target.drafts[name][:accept_length], bonus], drafts)
    for name in "abc":
        target.close(name)
    assert not target.engine.branches.biases._holders.any()


def test_only_tokens_that_the_draft_model_lacks_are_allowed():
    """Then others are drawn, which the target rejects; there is always something to draw from."""
    biases, logits = Biases(6, "cpu"), torch.tensor([[-torch.inf, 1.0, 0.0, 0.5, -1.0, -torch.inf]])
    row = biases.hold(pack_bias([0, 5], {}))
    biases.add(logits, np.array([row], np.int32))
    draw = Sampler(num_candidates=2, top_m=3, seed=0).draw(logits, np.ones(1, np.float32))
    assert draw.drawn[0] in (1, 2, 3) and np.isfinite(draw.q_probs).all()


def test_biases_are_shared_kept_and_replaced():
    biases = Biases(8, "cpu")
    some = [pack_bias([], {1: float(i)}) for i in range(NUM_BIASES)]
    rows = [biases.hold(bias) for bias in some]
    assert sorted(rows) == list(range(1, NUM_BIASES + 1))
    assert biases.hold(some[3]) == rows[3] and biases.hold(NO_BIAS) == UNBIASED
    assert biases.hold(pack_bias([7], {})) == UNBIASED, "there is no room for another"
    biases.release(rows[3])
    assert biases.hold(pack_bias([7], {})) == UNBIASED, "one request still has it"
    biases.release(rows[3])
    assert biases.hold(some[3]) == rows[3], "it was kept"
    biases.release(rows[3])
    assert biases.hold(pack_bias([7], {})) == rows[3]
    assert biases.table[rows[3]].tolist() == [-1e4] * 7 + [0.0]
    assert biases.allowed(rows[3], np.array([7, 1])).tolist() == [7]
    assert biases.allowed(UNBIASED, np.array([7, 1])).tolist() == [7, 1]


def test_a_bias_that_is_none_is_left_out():
    """Nothing that a target might say of its biases is more than a bias over the vocabulary."""
    for bias in (
        Bias(token_ids=b"123", values=b"123"),
        Bias(token_ids=np.int32(8).tobytes(), values=np.float32(1).tobytes()),
        Bias(token_ids=np.int32(-1).tobytes(), values=np.float32(1).tobytes()),
        Bias(token_ids=np.int32(1).tobytes(), values=np.float32("nan").tobytes()),
        Bias(token_ids=np.int32(1).tobytes(), values=np.float32(1e30).tobytes()),
        Bias(token_ids=np.int32(1).tobytes()),
        Bias(allowed=b"\0"),
        Bias(allowed=b"\0\x80"),
    ):
        assert dense_bias(bias, 8) is None and Biases(8, "cpu").hold(bias) == UNBIASED
    assert pack_bias([MAX_ALLOWED_ID], {}) == NO_BIAS == pack_bias([], dict.fromkeys(range(MAX_BIASED + 1), 1.0))
    assert dense_bias(pack_bias([1, 6], {6: -2.0, 3: 5.0}), 8).tolist() == [-1e4, 0, -1e4, -1e4, -1e4, -1e4, -2, -1e4]
