"""Saguaro sampling: lossless by enumeration, and its trade-off between acceptance and hit rate."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ssd.policy import saguaro

FACTORS = (1.0, 0.8, 0.5, 0.2, 0.05, 0.0)


@st.composite
def distributions(draw, num: int, size: int = 6, zeros: bool = True):
    """[num, size] rows that sum to 1, some of them with zeros."""
    low = 0.0 if zeros else 0.05
    weights = draw(st.lists(st.floats(low, 1), min_size=num * size, max_size=num * size))
    weights = np.round(weights, 6).reshape(num, size)
    weights[:, 0] += 1e-3
    return weights / weights.sum(axis=1, keepdims=True)


def propose(q: np.ndarray, fan_out: int, factor: float) -> np.ndarray:
    """q' [V] of one unsorted row q [V]."""
    order = np.argsort(-q, kind="stable")
    proposal = np.empty_like(q)
    proposal[order] = saguaro(q[None, order], fan_out, factor)[0]
    return proposal


def emit(p: np.ndarray, q: np.ndarray, draft: int) -> tuple[float, np.ndarray]:
    """Chance that a draft from q is accepted, and what is emitted when it is not (zeros where nothing can be)."""
    accept = min(1.0, p[draft] / q[draft])
    residual = np.maximum(p - q, 0)
    return accept, residual / residual.sum() if residual.sum() else residual


def acceptance(p: np.ndarray, q: np.ndarray) -> float:
    return float(np.minimum(p, q).sum())


def hit_when_rejected(p: np.ndarray, q: np.ndarray, prepared: np.ndarray) -> float:
    residual = np.maximum(p - q, 0)
    return float(residual[prepared].sum() / residual.sum())


@given(distributions(4), st.lists(st.integers(0, 6), min_size=4, max_size=4), st.floats(0, 1))
def test_definition(q, fan_out, factor):
    q = -np.sort(-q)
    proposal = saguaro(q, np.array(fan_out), factor)
    assert proposal.sum(axis=1) == pytest.approx(1.0)
    for row, new, count in zip(q, proposal, fan_out):
        weights = np.where(np.arange(6) < count, factor, 1.0)
        expected = row if not row[count:].any() else weights * row / (weights * row).sum()
        assert new == pytest.approx(expected)


@given(distributions(3), st.integers(0, 6))
def test_a_factor_of_one_changes_no_bit(q, fan_out):
    q = (-np.sort(-q)).astype(np.float32)
    for factor in (1.0, np.ones(3)):
        proposal = saguaro(q, fan_out, factor)
        assert proposal.dtype == np.float32 and np.array_equal(proposal, q)


@pytest.mark.parametrize("factor", FACTORS)
def test_greedy_rows_and_rows_without_other_tokens_are_unchanged(factor):
    one_hot = np.eye(1, 5, dtype=np.float32)
    assert np.array_equal(saguaro(one_hot, 3, factor), one_hot)
    all_prepared = np.array([[0.6, 0.4, 0.0]], np.float32)
    assert np.array_equal(saguaro(all_prepared, 2, factor), all_prepared)


def test_rows_have_their_own_factor_and_fan_out():
    q = np.tile([0.5, 0.3, 0.2], (3, 1))
    proposal = saguaro(q, np.array([1, 2, 2]), np.array([0.5, 0.5, 1.0]))
    assert proposal == pytest.approx(np.array([[1 / 3, 0.4, 4 / 15], [5 / 12, 0.25, 1 / 3], [0.5, 0.3, 0.2]]))


@given(st.data(), st.integers(1, 3), st.sampled_from(FACTORS))
def test_output_is_the_targets_own_by_enumeration(data, fan_out, factor):
    """Two drafts and the bonus token over a vocabulary of 3: the sum over all paths against p alone."""
    vocab, depth = 3, 3
    contexts = [path for n in range(depth) for path in itertools.product(range(vocab), repeat=n)]
    target = dict(zip(contexts, data.draw(distributions(len(contexts), vocab))))
    drafter = dict(zip(contexts, data.draw(distributions(len(contexts), vocab))))
    proposal = {context: propose(q, fan_out, factor) for context, q in drafter.items()}
    emitted = dict.fromkeys(itertools.product(range(vocab), repeat=depth), 0.0)

    def decode(path: tuple[int, ...], chance: float) -> None:
        """Finish `path` with the target alone."""
        if len(path) == depth:
            emitted[path] += chance
            return
        for token, prob in enumerate(target[path]):
            decode((*path, token), chance * prob)

    for drafts in itertools.product(range(vocab), repeat=depth - 1):
        chance = 1.0
        for n in range(depth - 1):
            chance *= proposal[drafts[:n]][drafts[n]]
        for n in range(depth - 1):
            if not chance:
                break
            accept, residual = emit(target[drafts[:n]], proposal[drafts[:n]], drafts[n])
            for token, prob in enumerate(residual):
                decode((*drafts[:n], token), chance * (1 - accept) * prob)
            chance *= accept
        decode(drafts, chance)

    alone = {path: np.prod([target[path[:n]][path[n]] for n in range(depth)]) for path in emitted}
    assert list(emitted.values()) == pytest.approx(list(alone.values()), abs=1e-9)


def test_output_is_biased_when_the_verifier_is_given_the_unchanged_q():
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.6, 0.3, 0.1])
    drawn_from = propose(q, 1, 0.2)
    output = np.zeros(3)
    for draft in range(3):
        accept, residual = emit(p, q, draft)
        output[draft] += drawn_from[draft] * accept
        output += drawn_from[draft] * (1 - accept) * residual
    assert np.abs(output - p).sum() > 0.05


@given(distributions(2, zeros=False), st.integers(1, 4))
def test_a_smaller_factor_never_lowers_the_hit_chance_of_a_rejection(rows, fan_out):
    p, q = rows
    prepared = np.argsort(-q, kind="stable")[:fan_out]
    chances = []
    for factor in FACTORS:
        proposal = propose(q, fan_out, factor)
        if acceptance(p, proposal) < 1 - 1e-9:
            chances.append(hit_when_rejected(p, proposal, prepared))
    assert all(later >= earlier - 1e-9 for earlier, later in itertools.pairwise(chances))


@given(distributions(2, zeros=False), st.integers(1, 4))
def test_acceptance_is_concave_in_the_mass_left_on_prepared_tokens(rows, fan_out):
    """So it falls with C below the best C, which is 1 where q fits the target."""
    p, q = rows
    prepared = np.argsort(-q, kind="stable")[:fan_out]
    proposals = [propose(q, fan_out, factor) for factor in FACTORS]
    mass = [proposal[prepared].sum() for proposal in proposals]
    accepted = [acceptance(p, proposal) for proposal in proposals]
    assert mass == sorted(mass, reverse=True)
    for i in range(1, len(FACTORS) - 1):
        share = (mass[i] - mass[i + 1]) / (mass[i - 1] - mass[i + 1])
        assert accepted[i] >= share * accepted[i - 1] + (1 - share) * accepted[i + 1] - 1e-9
    fitting = [acceptance(q, proposal) for proposal in proposals]
    assert fitting[0] == pytest.approx(1.0)
    assert fitting == sorted(fitting, reverse=True)
