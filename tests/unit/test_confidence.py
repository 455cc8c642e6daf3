"""Branches by the drafter's own probabilities, against brute force and in an engine."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from engine_target import K, grow
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ssd.drafter.prediction import MAX_REQUESTS
from vllm_ssd.policy import MAX_LEARNED_FAN_OUT, Confidence, Draws, FanOut, confidence_levels, uniform_offsets
from vllm_ssd.policy.confidence import NUM_LEVELS, NUM_UNIFORMS

SURE, UNSURE, HOPELESS = confidence_levels(np.array([0.999, 0.5, 0.001])).tolist()
levels = st.integers(0, NUM_LEVELS - 1)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=20))
def test_levels_rise_with_probability(probs):
    found = confidence_levels(np.sort(probs))
    assert found[0] >= 0 and found[-1] < NUM_LEVELS and (np.diff(found) >= 0).all()
    assert confidence_levels(np.array([0.0, 0.55, 1.0])).tolist() == [0, NUM_LEVELS // 2, NUM_LEVELS - 1]


def taught(rng: random.Random, num_drafts: int) -> Confidence:
    """One that has seen outcomes of all kinds."""
    confidence = Confidence(FanOut(num_drafts))
    for _ in range(60):
        k = rng.randint(0, num_drafts)
        draws = rng.choice(list(Draws))
        most = NUM_LEVELS * (NUM_UNIFORMS if draws == Draws.FORESEEN else 1)
        drafts = [rng.randrange(most) for _ in range(num_drafts)]
        candidates = np.array([rng.randrange(NUM_LEVELS) for _ in range(5)])
        confidence.observe(draws, num_drafts, drafts, k, candidates, rng.choice([None, 0, 1, 4]))
    return confidence


def hit_chance(
    confidence: Confidence, draws: Draws, drafts: list[int], candidates: np.ndarray, counts: list[int]
) -> float:
    """Chance that the outcome has a branch, from the tables; a candidate is never likelier than one before it."""
    total, reached = 0.0, 1.0
    for k, count in enumerate(counts):
        full = k == len(drafts)
        rate = 0.0 if full else confidence._accepted[draws, drafts[k]] / confidence._tried[draws, drafts[k]]
        chance = 1.0
        for rank, level in enumerate(candidates[k][:count].tolist()):
            at = draws, int(full), min(rank, 3), level
            chance = min(chance, confidence._right[at] / confidence._seen[at])
            total += reached * (1 - rate) * chance
        reached *= rate
    return total


@settings(max_examples=40)
@given(st.integers(0, 2), st.integers(1, 6), st.sampled_from(Draws), st.data(), st.randoms(use_true_random=False))
def test_no_other_split_hits_more_often(num_drafts, budget, draws, data, rng):
    confidence = taught(rng, num_drafts)
    drafts = data.draw(st.lists(levels, min_size=num_drafts, max_size=num_drafts))
    if draws == Draws.FORESEEN:
        drafts = np.add(drafts, uniform_offsets([rng.random() for _ in drafts])).tolist()
    candidates = np.array([data.draw(st.lists(levels, min_size=3, max_size=3)) for _ in range(num_drafts + 1)])
    counts = confidence.counts(draws, drafts, candidates, True, budget)
    assert len(counts) == num_drafts + 1 and sum(counts) == min(budget, 3 * (num_drafts + 1)) and max(counts) <= 3
    best = max(
        hit_chance(confidence, draws, drafts, candidates, list(split))
        for split in itertools.product(range(4), repeat=num_drafts + 1)
        if sum(split) <= budget
    )
    assert hit_chance(confidence, draws, drafts, candidates, counts) == pytest.approx(best)
    assert confidence.hit_chances(num_drafts)[min(budget, 3 * (num_drafts + 1))] == pytest.approx(best)


def test_what_is_not_known_is_as_likely_as_it_mostly_is():
    fan_out = FanOut(2)
    confidence = Confidence(fan_out)
    for _ in range(200):
        fan_out.observe(2, 2, 0, True, 16)
    unknown = np.full((3, 17), -1)
    counts = confidence.counts(Draws.GREEDY, [None, None], unknown, True, 8)
    assert sum(counts) == 8 and counts[2] == max(counts)
    doubted = confidence.counts(Draws.GREEDY, [HOPELESS, None], unknown, True, 8)
    assert sum(doubted) == 8 and doubted[0] == max(doubted)


def test_the_place_of_a_draft_has_no_branch_and_is_no_rank():
    """Both the same: the draft is left out, or its place is marked."""
    confidence = taught(random.Random(5), 1)
    without = np.array([[9, 7, 5, 3, 1, -1], [8, 6, 4, 2, 1, 0]])
    marked = np.array([[9, -1, 7, 5, 3, 1], [8, 6, 4, 2, 1, 0]])
    for budget in range(1, 12):
        expected = confidence.counts(Draws.GREEDY, [UNSURE], without, True, budget)
        assert confidence.counts(Draws.GREEDY, [UNSURE], marked, True, budget) == expected
        assert expected[0] <= 5


def test_a_round_that_is_doubted_gets_its_branches_where_it_will_end():
    """Half of the rounds fail at a first draft that the drafter doubts; their mean says little of any."""
    rng = random.Random(3)
    fan_out = FanOut(3, branch_budget=6)
    confidence, hits = Confidence(fan_out), {"mean": 0, "confidence": 0}
    candidates = np.array([[UNSURE] * 5 + [HOPELESS] * 11] * 4)
    for i in range(600):
        k, rank = rng.choice([0, 3]), rng.randrange(5)
        drafts = [HOPELESS if k == 0 else SURE, SURE, SURE]
        if i >= 100:
            hits["mean"] += rank < fan_out.counts(3, True, 6)[k]
            hits["confidence"] += rank < confidence.counts(Draws.GREEDY, drafts, candidates, True, 6)[k]
        fan_out.observe(3, k, rank, True, 16)
        confidence.observe(Draws.GREEDY, 3, drafts, k, candidates[k], rank)
    assert hits["confidence"] == 500 and hits["mean"] < 400
    assert confidence.hit_chances(3)[6] > 0.9 > fan_out.hit_chances(3, True)[6]


def test_sampled_and_greedy_requests_are_learned_apart_and_old_rounds_forgotten():
    confidence = Confidence(FanOut(1))
    candidates = np.full((2, 16), UNSURE)

    def splits() -> list[list[int]]:
        return [confidence.counts(sampled, [UNSURE], candidates, True, 6) for sampled in (Draws.GREEDY, Draws.SAMPLED)]

    for i in range(300):
        confidence.observe(Draws.GREEDY, 1, [UNSURE], 0, candidates[0], i % 6)
        confidence.observe(Draws.SAMPLED, 1, [UNSURE], 1, candidates[1], i % 6)
    greedy, sampled = splits()
    assert greedy[0] > 3 > greedy[1] and sampled[0] < 3 < sampled[1]
    for i in range(9000):
        confidence.observe(Draws.GREEDY, 1, [UNSURE], 1, candidates[1], i % 6)
    assert splits()[0][0] < 3
    assert confidence._tried.sum() < 9000, "nothing was forgotten"


def test_a_configured_fan_out_is_kept(make_target):
    target = make_target(fan_out=[1, 2, 3, 2])
    target.open("a", [1, 2, 3, 4, 5])
    grow(target)
    (_, bonus), drafts = next(iter(target.blocks["a"].items()))
    target.advance("a", [bonus], list(drafts))
    assert list(target.engine.sequences["a"].fan_out) == [1, 2, 3, 2]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_an_engine_splits_by_what_its_model_said(make_target, temperature):
    """After hits, candidates at all fork points have the probabilities of the model, and the split follows them."""
    target = make_target(fan_out=None, max_fan_out=MAX_LEARNED_FAN_OUT, max_branches=16, top_m=13)
    model, engine = target.model, target.engine
    target.open("a", [1, 2, 3, 4, 5], temperature)
    for _ in range(4):
        grow(target)
        (k, bonus), drafts = sorted(target.blocks["a"].items())[-1]
        target.advance("a", target.drafts["a"][:k] + [bonus], list(drafts))
        sequence = engine.sequences["a"]
        spine, first = sequence.tokens, sequence.length - 1
        assert set(range(first, first + K)) <= set(sequence.candidates), "the winner's candidates were lost"
        known, of_drafts = np.full((K + 1, 13), -1), []
        for position, (ids, probs, *_) in sequence.candidates.items():
            logits = model.reference_logits(spine[: position + 1])
            want = torch.softmax(logits[torch.from_numpy(ids).long()] / (temperature or 1.0), -1).numpy()
            np.testing.assert_allclose(probs, want, rtol=1e-4)
            others = np.full(13, True)
            if position < first + K:
                others = ids != spine[position + 1]
                of_drafts += confidence_levels(want[~others]).tolist()
            known[position - first, : others.sum()] = confidence_levels(want[others] / want[others].sum())
        budget = engine._num_branches
        confidence = engine._outcomes._confidence
        draws = Draws.SAMPLED if temperature else Draws.GREEDY
        assert sequence.fan_out == confidence.counts(draws, of_drafts, known, True, budget)
    assert confidence._num_observed == 4, "an outcome was not learned from"
    assert engine._outcomes.hit_chances(K) != engine._fan_out.hit_chances(K, True)


def test_many_requests_are_split_by_the_mean(make_target):
    target = make_target(fan_out=None, max_fan_out=MAX_LEARNED_FAN_OUT, max_branches=16, top_m=13)
    target.open("a", [1, 2, 3, 4, 5])
    grow(target)
    (k, bonus), drafts = sorted(target.blocks["a"].items())[-1]
    target.advance("a", target.drafts["a"][:k] + [bonus], list(drafts))
    grow(target)
    sequence, outcomes = target.engine.sequences["a"], target.engine._outcomes
    mean = target.engine._fan_out.counts(len(sequence.tokens) - sequence.length, sequence.after_hit, 6)
    few, many = (outcomes.counts(sequence, 6, number) for number in (MAX_REQUESTS, MAX_REQUESTS + 1))
    assert many == mean != few
    learned = outcomes._confidence._num_observed
    outcomes.observe(sequence, 0, 7)
    assert outcomes._confidence._num_observed == learned
    assert outcomes.hit_chances(K) == target.engine._fan_out.hit_chances(K, True)
