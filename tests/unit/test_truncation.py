"""The proposal loses the tokens that the request cannot sample, and no others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_target import K, grow
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

from vllm_ssd.compat.target.truncation import truncation_of
from vllm_ssd.drafter.sampler import Sampler
from vllm_ssd.drafter.truncation import NOTHING, truncate, truncation_row
from vllm_ssd.link.protocol import (
    ALL_TOKENS,
    Open,
    ProtocolError,
    Step,
    Truncation,
    decode_to_drafter,
    encode,
    pack_ids,
)

CUTS = [Truncation(2), Truncation(top_p=0.5), Truncation(min_p=0.3), Truncation(4, 0.7), Truncation(3, 0.9, 0.05)]


@settings(max_examples=200, derandomize=True)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 40),
    st.floats(0.01, 1).map(np.float32).map(float),
    st.sampled_from([0.3, 1.0, 4.0]),
)
def test_the_cut_is_vllms_own(seed, top_k, top_p, temperature):
    logits = (
        torch.randn(4, 32, generator=torch.Generator().manual_seed(seed)).sort(descending=True).values / temperature
    )
    probs = torch.softmax(logits, -1)
    k, p = torch.full((4,), min(top_k, 32)), torch.full((4,), top_p)
    expected = torch.softmax(apply_top_k_top_p_pytorch(logits.clone(), k, p), -1).numpy()
    rows = np.tile(np.float32(truncation_row(Truncation(top_k, top_p))), (4, 1))
    found = truncate(probs.numpy(), rows)
    above = np.cumsum(np.where(np.arange(32) < top_k, probs.numpy(), 0), 1)
    near = (np.abs(above - top_p * above[:, -1:]) < 1e-5).any(1)  # where rounding decides
    np.testing.assert_allclose(found[~near], expected[~near], rtol=1e-4, atol=1e-7)


def test_rows_that_lose_nothing_are_kept_bit_for_bit():
    probs = np.random.default_rng(0).dirichlet(np.ones(6), 3).astype(np.float32)
    probs = -np.sort(-probs, 1)
    assert truncate(probs, np.array([NOTHING] * 3, np.float32)) is probs
    assert truncation_row(Truncation(top_p=0.95)) == NOTHING and truncation_row(Truncation(20, 0.95))[1] == 0.95
    found = truncate(probs, np.array([NOTHING, (6, 1, 0), (2, 1, 0)], np.float32))
    assert (found[:2] == probs[:2]).all() and (found[2, 2:] == 0).all() and found[2].sum() == pytest.approx(1)


@pytest.mark.parametrize("truncation", CUTS)
def test_a_truncated_request_drafts_what_it_may_sample(make_target, truncation):
    """Through a hit and a miss; q is what was drawn from. A greedy and a free request beside it keep their own."""
    target = make_target()
    target.open("cut", [1, 2, 3], 0.8, truncation)
    target.open("free", [1, 2, 3], 0.8)
    target.open("greedy", [1, 2, 3], 0.0, truncation)
    for _ in range(4):
        grow(target)
        for name in ("cut", "free", "greedy"):
            assert len(target.blocks[name]) >= 2
            (accept_length, bonus), drafts = max(target.blocks[name].items())
            target.advance(name, [*target.drafts[name][:accept_length], bonus], drafts)
    target.advance("cut", [5], [])
    grow(target)
    assert {len(drafts) for drafts in target.blocks["cut"].values()} == {K}


def test_draws_follow_the_truncated_q():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.07, 0.03]).log().repeat(40_000, 1)
    rows = np.float32([truncation_row(Truncation(4, 0.85))] * len(logits))
    draw = Sampler(num_candidates=5, top_m=5, seed=0).draw(logits, np.ones(len(logits), np.float32), None, rows)
    expected = np.array([0.4, 0.3, 0.2]) / 0.9
    np.testing.assert_allclose(draw.q_probs[0], [*expected, 0, 0], rtol=1e-5)
    seen = np.bincount(draw.drawn, minlength=5)
    assert seen[3:].sum() == 0 and draw.candidates[0].tolist() == [0, 1, 2, 3, 4], "bonus tokens are predicted uncut"
    chi_square = ((seen[:3] - len(logits) * expected) ** 2 / (len(logits) * expected)).sum()
    assert chi_square < 23  # 2 degrees of freedom: 1e-5


def test_sampling_parameters_travel_as_vllm_has_them():
    assert truncation_of(SamplingParams()) is ALL_TOKENS
    assert truncation_of(SamplingParams(top_k=-1, top_p=0.9)) == Truncation(0, 0.9)
    cut = truncation_of(SamplingParams(top_k=20, top_p=0.8, min_p=0.05))
    assert cut == Truncation(20, 0.8, 0.05)
    step = Step([Open("a", 1, pack_ids([1]), 1.0, cut)], 3)
    assert decode_to_drafter(encode(step)) == step


@pytest.mark.parametrize("wrong", [Truncation(-1), Truncation(top_p=1.5), Truncation(min_p=float("nan"))])
def test_impossible_values_are_no_message_and_open_nothing(make_target, wrong):
    with pytest.raises(ProtocolError):
        decode_to_drafter(encode(Step([Open("a", 1, pack_ids([1]), 1.0, wrong)], 3)))
    target = make_target()
    target.open("a", [1, 2], 0.8, wrong)
    grow(target)
    assert target.evicted == 1 and not target.engine.sequences
