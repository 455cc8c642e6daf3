"""Which branches to grow, given the drafter's own probabilities in this round."""

import enum
from collections.abc import Sequence

import numpy as np

from vllm_ssd.policy.fan_out import MAX_LEARNED_FAN_OUT, FanOut

NUM_LEVELS = 16
"""Classes of probabilities that are learned separately, of equal width in log odds."""
MAX_LOG_ODDS = 7.6
"""The classes span log odds from -MAX_LOG_ODDS to MAX_LOG_ODDS."""
NUM_UNIFORMS = 8
"""Classes of the uniform numbers that decide about drafts, which are learned separately where they are foreseen."""
NUM_RANKS = 4
"""Candidate ranks that are learned separately; the last one covers all further ranks."""
MEMORY_OBSERVATIONS = 8192
"""Observations after which all weights are halved. More than in `FanOut`: there are more classes, and they depend more
on the models than on the text."""
PRIOR_OBSERVATIONS = 8.0
"""Weight, in observations, of the prior that the drafter is calibrated."""
CURVE_ROUNDS = 64
"""Rounds over which hit chances are averaged exponentially."""

_RANKS = np.minimum(np.arange(MAX_LEARNED_FAN_OUT), NUM_RANKS - 1)
_CHANCES = 1 / (1 + np.exp(-MAX_LOG_ODDS * (2 * (np.arange(NUM_LEVELS) + 0.5) / NUM_LEVELS - 1)))
_BOUNDS = 1 / (1 + np.exp(-MAX_LOG_ODDS * (2 * np.arange(1, NUM_LEVELS) / NUM_LEVELS - 1)))


class Draws(enum.IntEnum):
    """How a request's tokens are drawn; each kind is learned separately."""

    GREEDY = 0
    SAMPLED = 1
    FORESEEN = 2  # sampled with noise that the drafter knows


def confidence_levels(probs: np.ndarray) -> np.ndarray:
    """Classes of `probs`, float of any shape in [0, 1]. -> int64 in 0 … NUM_LEVELS - 1."""
    return np.searchsorted(_BOUNDS, probs, side="right")


def uniform_offsets(uniforms: Sequence[float]) -> list[int]:
    """What to add to the level of each foreseen draft, which is accepted if p / q is at least its uniform number."""
    return [NUM_LEVELS * min(int(NUM_UNIFORMS * u), NUM_UNIFORMS - 1) for u in uniforms]


class Confidence:
    """Splits a round's branches over its candidates, by the learned accuracy of the drafter's probabilities.

    The chance of accept length k is the product of the acceptance rates of the first k drafts and the rejection rate of
    the next. The chance of a candidate is learned by its probability, its rank, and whether all drafts were accepted.
    `fan_out` supplies the chances where the drafter's probabilities are not known yet.
    """

    def __init__(self, fan_out: FanOut) -> None:
        self._fan_out = fan_out
        shape = len(Draws), NUM_UNIFORMS * NUM_LEVELS  # [draws, uniform number and level]
        self._tried = np.full(shape, PRIOR_OBSERVATIONS)
        self._accepted = np.broadcast_to(PRIOR_OBSERVATIONS * np.tile(_CHANCES, NUM_UNIFORMS), shape).copy()
        shape = len(Draws), 2, NUM_RANKS, NUM_LEVELS  # [draws, all accepted, rank, level]
        self._seen = np.full(shape, PRIOR_OBSERVATIONS)
        self._right = np.broadcast_to(PRIOR_OBSERVATIONS * _CHANCES, shape).copy()
        self._num_observed = 0
        # By number of drafts: rounds and mean hit chances, after a hit.
        self._curves: dict[int, tuple[int, np.ndarray]] = {}

    def observe(
        self,
        draws: Draws,
        num_drafts: int,
        drafts: Sequence[int | None],
        accept_length: int,
        candidates: np.ndarray,
        rank: int | None,
    ) -> None:
        """Learn from the outcome of a round of `num_drafts` drafts.

        drafts: levels of the drafts, at least up to the first rejected one, None if unknown, and of foreseen draws plus
        their `uniform_offsets`; candidates [C] int64:
        levels of the candidates at the outcome's fork point, as in `counts`; rank: the bonus token's rank among them,
        None if it is not a candidate.
        """
        for j, level in enumerate(drafts[: accept_length + 1]):
            if level is not None:
                self._tried[draws, level] += 1
                self._accepted[draws, level] += j < accept_length
        candidates = candidates[candidates >= 0][:MAX_LEARNED_FAN_OUT]
        kind, ranks = (draws, int(accept_length == num_drafts)), _RANKS[: len(candidates)]
        seen = np.bincount(ranks * NUM_LEVELS + candidates, minlength=NUM_RANKS * NUM_LEVELS)
        self._seen[kind] += seen.reshape(NUM_RANKS, NUM_LEVELS)
        if rank is not None and rank < len(candidates):
            self._right[*kind, ranks[rank], candidates[rank]] += 1
        self._num_observed += 1
        if self._num_observed == MEMORY_OBSERVATIONS:
            self._num_observed //= 2
            for table in (self._tried, self._accepted, self._seen, self._right):
                table /= 2

    def counts(
        self, draws: Draws, drafts: Sequence[int | None], candidates: np.ndarray, after_hit: bool, budget: int
    ) -> list[int]:
        """Branches per accept length that cover the `budget` likeliest outcomes.

        drafts [m]: level of each draft, as in `observe`; candidates [m + 1, C] int64: levels of the candidates at each
        fork point, likeliest first; negative where there is no candidate (as in the draft's own place) or none is known
        -> m + 1 counts that sum to at most `budget`, each at most 16
        """
        num_drafts = len(drafts)
        budget = min(budget, self._fan_out.budget)
        rates = (self._accepted[draws] / self._tried[draws]).tolist()
        mean_rates = self._fan_out.acceptance(num_drafts, after_hit)
        weights, reached = [], 1.0
        for level, mean_rate in zip(drafts, mean_rates):
            longer = reached * (mean_rate if level is None else rates[level])
            weights.append(reached - longer)
            reached = longer
        weights.append(reached)

        exists = candidates >= 0
        ranks = exists.cumsum(1) - 1
        exists &= ranks < MAX_LEARNED_FAN_OUT
        is_full = np.zeros((num_drafts + 1, 1), np.int64)
        is_full[-1] = 1
        chances = (self._right[draws] / self._seen[draws])[is_full, np.minimum(ranks, NUM_RANKS - 1), candidates]
        chances[~exists] = np.inf
        chances = np.minimum.accumulate(chances, 1)  # a candidate has a branch only if all likelier ones have
        chances[~exists] = 0.0
        for k in np.flatnonzero(~exists.any(1)).tolist():
            chances[k, :MAX_LEARNED_FAN_OUT] = self._fan_out.gains(k == num_drafts)[: chances.shape[1]]

        scores = (chances * np.array(weights)[:, None]).ravel()
        order = np.argsort(-scores, kind="stable")
        if after_hit:
            self._average(num_drafts, scores[order].cumsum())
        best = order[:budget]
        best = best[scores[best] > 0]
        return np.bincount(best // chances.shape[1], minlength=num_drafts + 1).tolist()

    def hit_chances(self, num_drafts: int) -> Sequence[float]:
        """Estimated hit rate with 0, 1, … branches, up to the budget, in a round of `num_drafts` after a hit."""
        if num_drafts not in self._curves:
            return self._fan_out.hit_chances(num_drafts, True)
        return self._curves[num_drafts][1].tolist()

    def _average(self, num_drafts: int, chances: np.ndarray) -> None:
        chances = np.concatenate(([0.0], chances[: self._fan_out.budget]))
        rounds, mean = self._curves.get(num_drafts, (0, chances))
        rounds = min(rounds + 1, CURVE_ROUNDS)
        self._curves[num_drafts] = rounds, mean + (chances - mean) / rounds
