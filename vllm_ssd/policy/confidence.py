"""Which branches to grow, by what the drafter's own probabilities say of this round."""

from collections.abc import Sequence

import numpy as np

from vllm_ssd.policy.fan_out import MAX_LEARNED_FAN_OUT, FanOut

NUM_LEVELS = 16
"""Classes of probabilities that are learned apart, of equal width in log odds."""
MAX_LOG_ODDS = 7.6
"""Log odds at which the last class ends; the first begins at the negative."""
NUM_RANKS = 4
"""Ranks of candidates that are learned apart; the last stands for all beyond."""
MEMORY_OBSERVATIONS = 8192
"""Observations at which the weight of all of them is halved: more than in `FanOut`, as classes are many, and depend on
the models more than on the text."""
PRIOR_OBSERVATIONS = 8.0
"""Weight of the prior, in observations: what the drafter gives a chance of p has the chance p."""
CURVE_ROUNDS = 64
"""Rounds that the mean hit chances are over, with falling weights."""

_RANKS = np.minimum(np.arange(MAX_LEARNED_FAN_OUT), NUM_RANKS - 1)
_CHANCES = 1 / (1 + np.exp(-MAX_LOG_ODDS * (2 * (np.arange(NUM_LEVELS) + 0.5) / NUM_LEVELS - 1)))
_BOUNDS = 1 / (1 + np.exp(-MAX_LOG_ODDS * (2 * np.arange(1, NUM_LEVELS) / NUM_LEVELS - 1)))


def confidence_levels(probs: np.ndarray) -> np.ndarray:
    """Classes of `probs`, float of any shape in [0, 1]. -> int64 in 0 … NUM_LEVELS - 1."""
    return np.searchsorted(_BOUNDS, probs, side="right")


class Confidence:
    """Splits branches over the candidates of one round, by chances learned of drafts and candidates as probable.

    The chance of accept length k is the product of the acceptance of the drafts before it, times that the next one is
    rejected; the chance of a candidate there is learned by its probability, its rank, and whether all drafts were
    accepted. Where the drafter's probabilities are not known yet, those of `fan_out` count. Greedy and sampled requests
    are learned apart.
    """

    def __init__(self, fan_out: FanOut) -> None:
        self._fan_out = fan_out
        shape = 2, NUM_LEVELS  # [sampled, level]
        self._tried = np.full(shape, PRIOR_OBSERVATIONS)
        self._accepted = np.broadcast_to(PRIOR_OBSERVATIONS * _CHANCES, shape).copy()
        shape = 2, 2, NUM_RANKS, NUM_LEVELS  # [sampled, all accepted, rank, level]
        self._seen = np.full(shape, PRIOR_OBSERVATIONS)
        self._right = np.broadcast_to(PRIOR_OBSERVATIONS * _CHANCES, shape).copy()
        self._num_observed = 0
        # By number of drafts, after a hit: rounds and mean hit chances.
        self._curves: dict[int, tuple[int, np.ndarray]] = {}

    def observe(
        self,
        sampled: bool,
        num_drafts: int,
        drafts: Sequence[int | None],
        accept_length: int,
        candidates: np.ndarray,
        rank: int | None,
    ) -> None:
        """Learn from one outcome of a round of `num_drafts` drafts.

        drafts: levels of the drafts, up to the first rejected one at least, None: not known; candidates [C] int64:
        levels of the candidates at the fork point of the outcome, as for `counts`; rank: of the bonus token among them,
        None if it is none of them.
        """
        for j, level in enumerate(drafts[: accept_length + 1]):
            if level is not None:
                self._tried[int(sampled), level] += 1
                self._accepted[int(sampled), level] += j < accept_length
        candidates = candidates[candidates >= 0][:MAX_LEARNED_FAN_OUT]
        kind, ranks = (int(sampled), int(accept_length == num_drafts)), _RANKS[: len(candidates)]
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
        self, sampled: bool, drafts: Sequence[int | None], candidates: np.ndarray, after_hit: bool, budget: int
    ) -> list[int]:
        """Branches by accept length: the likeliest `budget` outcomes, of each fork point the likeliest candidates.

        drafts [m]: level of each draft, None: not known; candidates [m + 1, C] int64: levels of the candidates at each
        fork point, likeliest first; negative where there is none, as in the place of the draft, or none is known.
        -> m + 1 counts that sum to at most `budget`, each at most 16.
        """
        num_drafts, kind = len(drafts), int(sampled)
        budget = min(budget, self._fan_out.budget)
        rates = (self._accepted[kind] / self._tried[kind]).tolist()
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
        chances = (self._right[kind] / self._seen[kind])[is_full, np.minimum(ranks, NUM_RANKS - 1), candidates]
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
        """Estimated hit rate of a round of `num_drafts` drafts after a hit with 0, 1, … branches, up to the budget."""
        if num_drafts not in self._curves:
            return self._fan_out.hit_chances(num_drafts, True)
        return self._curves[num_drafts][1].tolist()

    def _average(self, num_drafts: int, chances: np.ndarray) -> None:
        chances = np.concatenate(([0.0], chances[: self._fan_out.budget]))
        rounds, mean = self._curves.get(num_drafts, (0, chances))
        rounds = min(rounds + 1, CURVE_ROUNDS)
        self._curves[num_drafts] = rounds, mean + (chances - mean) / rounds
