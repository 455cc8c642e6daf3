"""Just-in-time and n-gram drafts, against brute force."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ssd.policy import NgramGain, jit_drafts, ngram_drafts

probabilities = st.floats(0.0, 1.0)


# ---- just-in-time and n-gram drafts ----------------------------------------------------------------------


def reference_ngram_drafts(tokens: list[int], num_drafts: int, min_n: int, max_n: int) -> list[int]:
    for n in range(max_n, min_n - 1, -1):
        for end in range(len(tokens) - 1, n - 1, -1):
            if tokens[end - n : end] == tokens[-n:]:
                copy = list(tokens)
                for i in range(num_drafts):
                    copy.append(copy[end + i])
                return copy[len(tokens) :]
    return []


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(0, 6), st.integers(1, 4), st.integers(0, 4))
def test_ngram_drafts_copy_what_followed_the_latest_longest_match(tokens, num_drafts, min_n, more):
    drafts = ngram_drafts(np.array(tokens, np.int32), num_drafts, min_n, min_n + more)
    assert drafts == reference_ngram_drafts(tokens, num_drafts, min_n, min_n + more)
    assert all(type(token) is int for token in drafts)


@st.composite
def waits(draw):
    survival = sorted(draw(st.lists(probabilities, min_size=1, max_size=8)), reverse=True)
    return dict(
        num_missed=draw(st.integers(1, 64)),
        max_drafts=draw(st.integers(0, 8)),
        accept_survival=survival,
        tokens_per_second=draw(st.floats(0, 1e4)),
        first_s=draw(st.floats(0, 0.02)),
        step_s=draw(st.floats(1e-4, 0.01)),
        bound_s=draw(st.floats(1e-3, 0.1)),
    )


@given(waits())
def test_jit_drafts_equal_brute_force(case):
    best, best_net = 0, 0.0
    for n in range(1, min(case["max_drafts"], len(case["accept_survival"])) + 1):
        wait_s = case["first_s"] + n * case["step_s"]
        gain = case["num_missed"] * sum(case["accept_survival"][:n])
        loss = case["tokens_per_second"] * wait_s
        if wait_s <= case["bound_s"] and gain > 1.05 * loss and gain - loss > best_net + 1e-9:
            best, best_net = n, gain - loss
    found = jit_drafts(**case)
    wait_s = case["first_s"] + found * case["step_s"]
    net = case["num_missed"] * sum(case["accept_survival"][:found]) - case["tokens_per_second"] * wait_s
    assert (found > 0) == (best > 0) or best_net < 1e-6
    assert not found or net == pytest.approx(best_net, abs=1e-6) and wait_s <= case["bound_s"]


@given(waits())
def test_waiting_grows_with_misses_and_shrinks_with_the_rate(case):
    drafts = jit_drafts(**case)
    assert jit_drafts(**case | {"num_missed": case["num_missed"] + 1}) >= drafts
    assert jit_drafts(**case | {"tokens_per_second": 1.1 * case["tokens_per_second"]}) <= drafts


# ---- n-gram drafts: how many -----------------------------------------------------------------------------


@given(st.integers(0, 4), st.floats(0.0, 3.0), st.integers(0, 60))
def test_as_many_ngram_drafts_as_pay(usually_accepted, lost_per_draft, rounds):
    gain = NgramGain(4)
    for _ in range(rounds):
        gain.observe(4, usually_accepted)
    drafts, tokens = gain.drafts(4, lost_per_draft)
    assert 0 <= drafts <= 4 and (tokens > 0) == (drafts > 0)
    if rounds > 40 and 0.15 < lost_per_draft < 0.6:
        assert drafts == usually_accepted
    if lost_per_draft > 1:
        assert drafts == 0


def test_ngram_drafts_that_do_not_pay_are_tried_again():
    gain = NgramGain(2)
    for _ in range(50):
        gain.observe(2, 0)
    offered = [gain.drafts(2, 0.3) for _ in range(100)]
    assert offered.count((2, 0.0)) == 3 and offered.count((0, 0.0)) == 97
    for _ in range(100):
        gain.observe(2, 2)
    assert gain.drafts(2, 0.3)[0] == 2
