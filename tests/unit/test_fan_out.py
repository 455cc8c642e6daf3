"""Fan-out against brute force and the closed form."""

import itertools
import random
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ssd.policy import MAX_LEARNED_FAN_OUT, FanOut, allocate
from vllm_ssd.policy.fan_out import PLAUSIBLE

probabilities = st.floats(0.0, 1.0)


# ---- the closed form -------------------------------------------------------------------------------------


def geometric_accept_probs(num_drafts: int, acceptance: float) -> list[float]:
    """P(k) when each draft is accepted independently."""
    return [acceptance**k * (1 - acceptance) for k in range(num_drafts)] + [acceptance**num_drafts]


def closed_form(num_drafts: int, budget: float, acceptance: float, r: float) -> list[float]:
    """Saguaro, Theorem 12: the best real-valued fan-out for independent acceptance, where F candidates miss with F^-r.

    A geometric series in k, capped at k = K: F_k is proportional to P(k)^(1 / (1 + r)).
    """
    ratio = acceptance ** (1 / (1 + r))
    cap = ratio**num_drafts * (1 - acceptance) ** (-1 / (1 + r))
    first = budget / ((1 - ratio**num_drafts) / (1 - ratio) + cap)
    return [first * ratio**k for k in range(num_drafts)] + [first * cap]


def power_law(r: float):
    return lambda k, count: count**-r if count else 1.0


def miss_chance(accept_probs: list[float], fan_out: list[float], r: float) -> float:
    return sum(prob * count**-r for prob, count in zip(accept_probs, fan_out) if prob)


@given(st.integers(0, 5), st.floats(0.41, 0.9), st.floats(0.3, 3))
def test_allocation_of_a_large_budget_is_the_papers_closed_form(num_drafts, acceptance, r):
    """Where every accept length is plausible: with c(1) = 0 the others have no first branch to gain from."""
    accept_probs = geometric_accept_probs(num_drafts, acceptance)
    counts = allocate(1000, accept_probs, power_law(r))
    assert counts == pytest.approx(closed_form(num_drafts, 1000, acceptance, r), abs=num_drafts + 1)


@given(st.integers(1, 5), st.floats(2, 60), st.floats(0.05, 0.98), st.floats(0.2, 3), st.randoms(use_true_random=False))
def test_closed_form_is_a_numerical_optimum(num_drafts, budget, acceptance, r, rng):
    accept_probs = geometric_accept_probs(num_drafts, acceptance)
    best = closed_form(num_drafts, budget, acceptance, r)
    assert sum(best) == pytest.approx(budget)
    least = miss_chance(accept_probs, best, r)
    for _ in range(30):
        i, j = rng.sample(range(num_drafts + 1), 2)
        moved = list(best)
        step = rng.random() * 0.5 * moved[i]
        moved[i] -= step
        moved[j] += step
        assert miss_chance(accept_probs, moved, r) >= least * (1 - 1e-12)


@given(st.integers(1, 8), st.integers(9, 200), st.floats(0.05, 0.95), st.floats(0.1, 4))
def test_allocation_to_rejections_falls_with_length_and_flattens_with_r(num_drafts, budget, acceptance, r):
    accept_probs = geometric_accept_probs(num_drafts, acceptance)
    rejections = allocate(budget, accept_probs, power_law(r))[:-1]
    assert rejections == sorted(rejections, reverse=True)
    steep, flat = (closed_form(num_drafts, 1.0, acceptance, x)[:-1] for x in (r, r + 1))
    assert flat[0] / flat[-1] <= steep[0] / steep[-1] + 1e-12


def test_allocation_at_certain_outcomes():
    assert allocate(12, geometric_accept_probs(3, 0.0), power_law(1.0)) == [12, 0, 0, 0]
    assert allocate(12, geometric_accept_probs(3, 1.0), power_law(1.0)) == [0, 0, 0, 12]


# ---- whole branches --------------------------------------------------------------------------------------


@st.composite
def outcomes(draw, max_drafts: int = 3, max_budget: int = 8):
    """A budget, P(k), and a convex miss curve per accept length."""
    num_lengths = draw(st.integers(1, max_drafts + 1))
    budget = draw(st.integers(0, max_budget))
    weights = draw(st.lists(st.floats(0, 1), min_size=num_lengths, max_size=num_lengths))
    total = sum(weights)
    accept_probs = [w / total for w in weights] if total > 1e-6 else [1 / num_lengths] * num_lengths
    curves = []
    for _ in range(num_lengths):
        gains = sorted(draw(st.lists(probabilities, min_size=budget + 1, max_size=budget + 1)), reverse=True)
        scale = draw(probabilities) / max(sum(gains), 1.0)
        curves.append([1.0, *(1 - scale * gain for gain in itertools.accumulate(gains))])
    return budget, accept_probs, curves


def hit_chance(accept_probs, counts, curves) -> float:
    return sum(prob * (1 - curve[count]) for prob, curve, count in zip(accept_probs, curves, counts))


@given(outcomes(), st.integers(1, 9))
def test_allocation_equals_brute_force(case, most):
    budget, accept_probs, curves = case
    counts = allocate(budget, accept_probs, lambda k, f: curves[k][f], most)
    budget = min(budget, most * len(accept_probs))
    assert sum(counts) == budget
    seeds = [int(prob >= PLAUSIBLE) for prob in accept_probs]
    if sum(seeds) > budget:
        seeds = [0] * len(seeds)
    best = max(
        hit_chance(accept_probs, split, curves)
        for split in itertools.product(range(min(budget, most) + 1), repeat=len(accept_probs))
        if sum(split) == budget and all(map(int.__ge__, split, seeds))
    )
    assert all(map(int.__ge__, counts, seeds))
    assert hit_chance(accept_probs, counts, curves) == pytest.approx(best, abs=1e-12)


@given(outcomes(max_drafts=6, max_budget=30))
def test_a_larger_budget_never_removes_a_branch(case):
    budget, accept_probs, curves = case
    seeds = sum(prob >= PLAUSIBLE for prob in accept_probs)
    steps = [allocate(b, accept_probs, lambda k, f: curves[k][f]) for b in range(seeds, budget + 1)]
    for fewer, more in itertools.pairwise(steps):
        assert all(map(int.__le__, fewer, more))


def test_likelier_lengths_get_no_fewer_branches():
    counts = allocate(24, [0.3, 0.2, 0.15, 0.1, 0.25], lambda k, f: 0.4 / f if f else 1.0)
    assert counts[0] >= counts[4] >= counts[1] >= counts[2] >= counts[3] >= 1


def test_every_plausible_length_gets_a_branch_even_where_the_first_gains_nothing():
    measured = [0.130, 0.094, 0.070, 0.058, 0.048, 0.042, 0.035, 0.523]  # published: 70B / 1B, K = 7
    counts = allocate(24, measured, lambda k, f: f**-1.93 if f else 1.0)
    assert counts == [3, 3, 3, 3, 2, 2, 2, 6]


# ---- configured and learned ------------------------------------------------------------------------------


@given(
    st.integers(1, 8),
    st.integers(1, 40),
    st.one_of(st.none(), st.integers(0, 60)),
    st.lists(st.tuples(st.integers(0, 8), probabilities, st.one_of(st.none(), st.integers(0, 20)), st.booleans())),
)
def test_budget_is_never_exceeded(max_drafts, branch_budget, budget, observations):
    fan_out = FanOut(max_drafts, None, branch_budget)
    for num_drafts, part, rank, after_hit in observations:
        num_drafts = min(num_drafts, max_drafts)
        fan_out.observe(num_drafts, round(part * num_drafts), rank, after_hit)
    for num_drafts in range(max_drafts + 1):
        for after_hit in (True, False):
            counts = fan_out.counts(num_drafts, after_hit, budget)
            assert len(counts) == num_drafts + 1 and min(counts) >= 0 and max(counts) <= MAX_LEARNED_FAN_OUT
            most = MAX_LEARNED_FAN_OUT * (num_drafts + 1)
            assert sum(counts) == min(branch_budget, branch_budget if budget is None else budget, most)
            assert sum(fan_out.accept_probs(num_drafts, after_hit)) == pytest.approx(1.0)


@given(st.lists(st.integers(0, 9), min_size=2, max_size=9).filter(any), st.integers(0, 90))
def test_configured_fan_out_is_kept_or_scaled_down(configured, budget):
    num_drafts = len(configured) - 1
    fan_out = FanOut(num_drafts, configured)
    assert fan_out.counts(num_drafts, True) == configured
    scaled = fan_out.counts(num_drafts, False, budget)
    assert sum(scaled) == min(sum(configured), budget)
    assert all(abs(s - c * sum(scaled) / sum(configured)) < 1 for s, c in zip(scaled, configured))


def test_uniform_and_short_rounds():
    assert FanOut(4, 3).counts(4, True) == [3] * 5
    assert FanOut(4, 3).counts(2, True) == [3] * 3
    assert FanOut(4, [5, 4, 3, 2, 9]).counts(2, False) == [5, 4, 9]
    assert sum(FanOut(5).counts(5, True)) == 24


@dataclass
class Stream:
    """Outcomes of rounds with K drafts, P(k) and a Pareto law of ranks per class given."""

    accept_probs: list[float]
    laws: tuple[tuple[float, float], tuple[float, float]]  # (A, r) for k < K and k = K
    num_candidates: int = 16

    def miss(self, k: int, count: int) -> float:
        scale, r = self.laws[k == len(self.accept_probs) - 1]
        return scale * count**-r if count else 1.0

    def feed(self, fan_out: FanOut, rounds: int, after_hit: bool, rng: random.Random) -> None:
        lengths = range(len(self.accept_probs))
        for k in rng.choices(lengths, self.accept_probs, k=rounds):
            draw = rng.random()
            ranks = (f for f in range(self.num_candidates) if self.miss(k, f + 1) < draw)
            fan_out.observe(lengths[-1], k, next(ranks, None), after_hit, self.num_candidates)

    def hit_chance(self, counts: list[int]) -> float:
        return sum(prob * (1 - self.miss(k, count)) for k, (prob, count) in enumerate(zip(self.accept_probs, counts)))

    def best(self, budget: int) -> float:
        return self.hit_chance(allocate(budget, self.accept_probs, self.miss, self.num_candidates))


STREAMS = {
    "heavy tail": Stream([0.13, 0.094, 0.07, 0.058, 0.048, 0.042, 0.035, 0.523], ((0.35, 0.97), (0.35, 0.97))),
    "always rejected": Stream([0.9, 0.1, 0, 0, 0, 0, 0, 0], ((0.6, 0.5), (0.2, 2.0))),
    "always accepted": Stream([0.02, 0, 0, 0, 0, 0, 0.03, 0.95], ((0.5, 1.0), (0.5, 0.6))),
    "uneven classes": Stream([0.1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.1, 0.4], ((0.2, 2.0), (0.8, 0.4))),
}


@pytest.mark.parametrize("name", STREAMS)
def test_learned_fan_out_is_near_the_optimum(name):
    stream, fan_out = STREAMS[name], FanOut(7, None, 24)
    cold = stream.hit_chance(fan_out.counts(7, True))
    stream.feed(fan_out, 3000, True, random.Random(1))
    learned = stream.hit_chance(fan_out.counts(7, True))
    assert learned >= stream.best(24) - 0.005
    assert learned >= max(cold, stream.hit_chance([3] * 8)) - 0.002


def test_hits_and_misses_are_learned_separately():
    rng, fan_out = random.Random(2), FanOut(7, None, 24)
    for _ in range(10):
        STREAMS["always accepted"].feed(fan_out, 100, True, rng)
        STREAMS["always rejected"].feed(fan_out, 100, False, rng)
    assert max(fan_out.counts(7, True)) == fan_out.counts(7, True)[7]
    assert max(fan_out.counts(7, False)) == fan_out.counts(7, False)[0]


def test_learned_fan_out_follows_a_change():
    rng, fan_out = random.Random(3), FanOut(7, None, 24)
    STREAMS["always accepted"].feed(fan_out, 5000, True, rng)
    STREAMS["heavy tail"].feed(fan_out, 3000, True, rng)
    assert STREAMS["heavy tail"].hit_chance(fan_out.counts(7, True)) >= STREAMS["heavy tail"].best(24) - 0.01


def test_ranks_beyond_the_candidates_are_censored():
    """Fork points with few candidates must not bias the estimate of deep ranks."""
    law = ((0.7, 0.5), (0.7, 0.5))
    wide, narrow = Stream([0.5, 0.5], law, 64), Stream([0.5, 0.5], law, 4)
    chances = []
    for stream in (wide, narrow):
        fan_out = FanOut(1, None, 16)
        stream.feed(fan_out, 4000, True, random.Random(4))
        chances.append(fan_out.counts(1, True))
    assert chances[0] == pytest.approx(chances[1], abs=1)


def test_counts_stay_within_the_candidates_of_a_fork_point():
    fan_out = FanOut(3, None, 48)
    for _ in range(500):
        fan_out.observe(3, 0, 15, True, 16)
    counts = fan_out.counts(3, True)
    assert counts[0] == MAX_LEARNED_FAN_OUT and sum(counts) == 48


def test_counts_are_constant_between_refreshes():
    fan_out = FanOut(3, None, 16)
    first = fan_out.counts(3, True)
    for _ in range(31):
        fan_out.observe(3, 0, 9, True, 16)
        assert fan_out.counts(3, True) is first
    fan_out.observe(3, 0, 9, True, 16)
    assert fan_out.counts(3, True)[0] > first[0]
