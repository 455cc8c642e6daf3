"""The round estimator: what it predicts of every arm from the rounds of some."""

import math
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ssd.policy.estimator import MEMORY_ROUNDS, PRIOR_ACCEPTANCE, RoundEstimator

FIXED_S, TOKEN_S = 10e-3, 0.5e-3


def accept_length(drafts: int, acceptance: float, rng: random.Random) -> int:
    return next((j for j in range(drafts) if rng.random() >= acceptance), drafts)


def feed(
    estimator: RoundEstimator, num_drafts: int, rounds: int, acceptance: float = 0.7, rows: int = 4, seed: int = 0
) -> None:
    """Rounds whose rows all carry `num_drafts`; they take FIXED_S and TOKEN_S per token."""
    rng = random.Random(seed)
    offered = [num_drafts] * rows
    for _ in range(rounds):
        accepted = [accept_length(num_drafts, acceptance, rng) for _ in offered]
        estimator.observe(num_drafts, offered, accepted, FIXED_S + TOKEN_S * (rows + sum(offered)))


@st.composite
def rounds(draw, max_drafts: int):
    """(drafts asked for, offered and accepted by row, seconds); rows may carry less than was asked for."""
    num_drafts = draw(st.integers(0, max_drafts))
    offered = draw(st.lists(st.integers(0, num_drafts), min_size=1, max_size=5))
    accepted = [draw(st.integers(0, drafts)) for drafts in offered]
    return num_drafts, offered, accepted, draw(st.floats(1e-5, 1e2))


@given(st.data(), st.integers(1, 6))
def test_estimates_are_finite_and_in_bounds_after_any_rounds(data, max_drafts):
    estimator = RoundEstimator(max_drafts)
    observed = data.draw(st.lists(rounds(max_drafts), min_size=1, max_size=30))
    for observation in observed:
        estimator.observe(*observation)
        if data.draw(st.booleans()):
            estimator.discount(16.0)
    prediction, survival = estimator.predict(), estimator.survival()
    assert len(prediction.rates) == max_drafts + 1 and all(map(math.isfinite, prediction.rates))
    assert all(rate > 0 for rate in prediction.rates)
    assert all(0 <= chance <= 1 for chance in (*survival, *estimator.carried()))
    assert all(later <= earlier for earlier, later in pairwise((1.0, *survival)))
    sizes = [len(offered) for _, offered, _, _ in observed]
    for k, tokens in enumerate(prediction.tokens):
        assert min(sizes) * (1 - 1e-9) <= tokens <= max(sizes) * (1 + k) * (1 + 1e-9)
    for evidence, measured_s in zip(prediction.evidence, prediction.measured_s):
        assert evidence >= 0 and (measured_s > 0) == (evidence > 0)
    assert estimator.draft_seconds() >= 0 and (estimator.round_seconds(1) or 0) > 0


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=40))
def test_survival_is_a_probability_however_few_positions_were_tried(tries):
    estimator = RoundEstimator(4)
    for drafts, all_accepted in tries:
        estimator.observe(drafts, [drafts], [drafts if all_accepted else 0], 1.0)
    survival = estimator.survival()
    assert all(0 < chance <= 1 for chance in survival) and survival == sorted(survival, reverse=True)


def test_before_data_positions_inherit_the_prior():
    assert RoundEstimator(3).survival() == pytest.approx([PRIOR_ACCEPTANCE**j for j in (1, 2, 3)])
    assert RoundEstimator(3).round_seconds(4) is None and RoundEstimator(3).tokens_per_row(2) is None


def test_later_positions_inherit_the_previous_estimate_until_they_have_data():
    estimator = RoundEstimator(6)
    feed(estimator, 2, 500, acceptance=0.9)
    survival = estimator.survival()
    ratios = [later / earlier for earlier, later in pairwise((1.0, *survival))]
    assert ratios[1] == pytest.approx(0.9, abs=0.03)
    assert ratios[2:] == pytest.approx([ratios[1]] * 4)


def test_arms_that_were_measured_predict_the_others():
    """Acceptance comes from the widest arm, round time from the line through both."""
    estimator, rows, acceptance = RoundEstimator(8), 4, 0.7
    feed(estimator, 8, 300, acceptance)
    feed(estimator, 2, 300, acceptance)
    prediction = estimator.predict()
    for k in range(9):
        tokens = rows * sum(acceptance**j for j in range(k + 1))
        assert prediction.tokens[k] == pytest.approx(tokens, rel=0.04)
        assert prediction.seconds[k] == pytest.approx(FIXED_S + TOKEN_S * rows * (1 + k), rel=0.01)
    assert estimator.draft_seconds() == pytest.approx(TOKEN_S)
    assert [k for k in range(9) if prediction.evidence[k]] == [2, 8]
    assert prediction.measured_s[2] == pytest.approx(FIXED_S + 12 * TOKEN_S)


def test_an_arms_own_rows_outweigh_the_pooled_prediction():
    """Rows of this arm emit more than its acceptance by position explains, as when hits and acceptance go together."""
    estimator = RoundEstimator(2)
    for _ in range(2000):
        estimator.observe(2, [2, 0], [2, 0], 1.0)
        estimator.observe(1, [1, 1], [0, 0], 1.0)
    prediction = estimator.predict()
    assert prediction.tokens[2] > prediction.tokens[1] > prediction.tokens[0]
    assert prediction.tokens[2] / 2 == pytest.approx(2.0, rel=0.25)


def test_an_unmeasured_narrow_round_takes_half_of_the_narrowest_measured_one_at_least():
    estimator = RoundEstimator(8)
    for num_drafts, seconds in ((4, 1.0), (8, 10.0)):
        estimator.observe(num_drafts, [num_drafts], [0], seconds)
    assert estimator.predict().seconds[0] == pytest.approx(0.5)


def test_the_curve_changes_at_refits_only():
    estimator = RoundEstimator(2)
    estimator.observe(1, [1], [0], 1.0)
    assert estimator.round_seconds(2) is None
    estimator.refit()
    estimator.observe(1, [1], [0], 3.0)
    assert estimator.round_seconds(2) == pytest.approx(1.0)
    estimator.refit()
    assert estimator.round_seconds(2) == pytest.approx(2.0, rel=0.01)


@pytest.mark.parametrize(("factor", "rounds"), [(1.0, 3 * MEMORY_ROUNDS), (16.0, 120)])
def test_older_rounds_decay_and_discounted_ones_at_once(factor, rounds):
    estimator = RoundEstimator(4)
    feed(estimator, 4, 1000, acceptance=0.2)
    estimator.discount(factor)
    feed(estimator, 4, rounds, acceptance=0.9)
    assert estimator.survival()[0] == pytest.approx(0.9, abs=0.1)
    evidence = estimator.predict().evidence[4]
    assert evidence <= MEMORY_ROUNDS + 1 and (factor == 1 or evidence < 120)


def test_sums_are_rescaled_and_arms_out_of_memory_are_dropped():
    """20,000 rounds raise the weight by e^78: without rescaling sums lose their meaning."""
    estimator = RoundEstimator(3)
    feed(estimator, 3, 10, acceptance=0.5)
    feed(estimator, 1, 20_000, acceptance=0.5, rows=1)
    prediction = estimator.predict()
    assert prediction.evidence[3] == 0 == prediction.measured_s[3]
    assert prediction.evidence[1] == pytest.approx(MEMORY_ROUNDS + 1, rel=0.01)
    assert prediction.tokens[1] == pytest.approx(1.5, rel=0.1)
    assert prediction.measured_s[1] == pytest.approx(FIXED_S + 2 * TOKEN_S)
