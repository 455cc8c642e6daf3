"""How many bonus tokens to predict for each accept length."""

import heapq
from collections.abc import Callable, Sequence
from itertools import accumulate
from math import log

MAX_LEARNED_FAN_OUT = 16
"""Candidates for the bonus token at each fork point, and so the largest learned fan-out."""
PLAUSIBLE = 0.01
"""Probability from which an accept length always gets a branch."""
REFRESH_OBSERVATIONS = 32
"""Minimum number of observations between two allocations; an eighth of all observations if that is more."""
MEMORY_OBSERVATIONS = 1024
"""Observations after which all weights are halved."""
PRIOR_OBSERVATIONS = 8.0
"""Weight of each prior below, in observations."""
PRIOR_ACCEPTANCE = {True: 0.8, False: 0.4}
"""Acceptance rate of a draft after a hit and after a miss."""
PRIOR_FIRST = (0.5, 0.7)
"""Chance that the bonus token is the first candidate, after a rejection and after full acceptance."""
PRIOR_EXPONENT = 1.0
"""Exponent r of the Pareto law of ranks."""


def survival(accept_probs: Sequence[float]) -> list[float]:
    """Chance that at least 1, 2, … m drafts of a round are accepted; accept_probs [m + 1]: P(k)."""
    return list(accumulate(accept_probs[:0:-1]))[::-1]


def allocate(
    budget: int, accept_probs: Sequence[float], miss: Callable[[int, int], float], most: int | None = None
) -> list[int]:
    """Split a budget of branches over accept lengths to maximise the chance of a hit.

    accept_probs [m + 1]: P(k); miss(k, f): chance that f candidates at accept length k do not contain the bonus token;
    most: largest count per accept length (default: the budget).
    -> m + 1 counts that sum to budget, or to (m + 1) * most if that is less. If the budget allows, every accept length
    with a probability of at least 0.01 first gets one branch; the rest is split optimally if miss is convex in f.
    """
    most = budget if most is None else most
    budget = min(budget, most * len(accept_probs))
    plausible = [prob >= PLAUSIBLE for prob in accept_probs]
    counts = [int(seed) for seed in plausible] if sum(plausible) <= budget else [0] * len(accept_probs)

    def gain(k: int) -> tuple[bool, float, float, int]:
        return (
            counts[k] == most,
            -accept_probs[k] * (miss(k, counts[k]) - miss(k, counts[k] + 1)),
            -accept_probs[k],
            k,
        )

    queue = [gain(k) for k in range(len(counts))]
    heapq.heapify(queue)
    for _ in range(budget - sum(counts)):
        k = queue[0][-1]
        counts[k] += 1
        heapq.heapreplace(queue, gain(k))
    return counts


class FanOut:
    """Fan-out per accept length, learned from outcomes unless configured.

    fan_out: one count for all accept lengths, or num_speculative_tokens + 1 counts, the last for full acceptance;
    branch_budget: branches per request if the fan-out is learned (default: 4 per accept length).

    Acceptance is learned by draft position, separately after a hit and after a miss. The chance that F candidates miss
    the bonus token is fitted by a Pareto law, A * F^-r, separately after a rejection and after full acceptance.
    """

    def __init__(
        self,
        num_speculative_tokens: int,
        fan_out: int | Sequence[int] | None = None,
        branch_budget: int | None = None,
    ) -> None:
        num_lengths = num_speculative_tokens + 1
        self._fixed = None
        if fan_out is not None:
            self._fixed = [fan_out] * num_lengths if isinstance(fan_out, int) else list(fan_out)
        self._budget = sum(self._fixed) if self._fixed else branch_budget or 4 * num_lengths
        # [after hit][m][k]: rounds that carried m drafts and accepted k of them.
        self._rounds = {hit: [[0.0] * (m + 1) for m in range(num_lengths)] for hit in (True, False)}
        # [k == m]: bonus tokens with candidates, those ranked first, those ranked later, and the sum of log ranks.
        self._ranked, self._first, self._later, self._log_ranks = [0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]
        self._evidence = 0
        self._until_refresh = REFRESH_OBSERVATIONS
        self._cache: dict[tuple[int, bool, int], list[int]] = {}
        self._chances: dict[tuple[int, bool], list[float]] = {}
        self._rates: dict[tuple[int, bool], list[float]] = {}
        self._gains: dict[bool, list[float]] = {}

    def observe(
        self, num_drafts: int, accept_length: int, rank: int | None, after_hit: bool, num_candidates: int | None = None
    ) -> None:
        """Learn from one outcome.

        rank: rank of the bonus token among its fork point's candidates, from 0; None if it was not a candidate.
        num_candidates: number of candidates (default: the current fan-out); if 0, the rank is not learned.
        """
        self._rounds[after_hit][num_drafts][accept_length] += 1
        if num_candidates is None:
            num_candidates = self.counts(num_drafts, after_hit)[accept_length]
        if num_candidates:
            full = accept_length == num_drafts
            self._ranked[full] += 1
            if rank is None:
                self._log_ranks[full] += log(num_candidates)
            elif rank == 0:
                self._first[full] += 1
            else:
                self._later[full] += 1
                self._log_ranks[full] += log(rank + 1)
        self._evidence += 1
        self._until_refresh -= 1
        if not self._until_refresh:
            if self._evidence >= MEMORY_OBSERVATIONS:
                self._halve()
            self._until_refresh = max(REFRESH_OBSERVATIONS, self._evidence // 8)
            for cache in (self._cache, self._chances, self._rates, self._gains):
                cache.clear()

    @property
    def budget(self) -> int:
        """Most branches per request."""
        return self._budget

    @property
    def is_fixed(self) -> bool:
        """Whether the fan-out is configured, not learned."""
        return self._fixed is not None

    def counts(self, num_drafts: int, after_hit: bool, budget: int | None = None) -> list[int]:
        """Branches per accept length for a round of `num_drafts` drafts.

        -> num_drafts + 1 counts that sum to at most `budget` and the configured budget. Learned counts are at most 16,
        the number of candidates per fork point.
        """
        budget = self._budget if budget is None else min(budget, self._budget)
        key = (num_drafts, after_hit, budget)
        counts = self._cache.get(key)
        if counts is None:
            if self._fixed is not None:
                counts = scale_down(self._fixed[:num_drafts] + self._fixed[-1:], budget)
            else:
                counts = allocate(
                    budget, self.accept_probs(num_drafts, after_hit), self._miss_law(num_drafts), MAX_LEARNED_FAN_OUT
                )
            self._cache[key] = counts
        return counts

    def hit_chances(self, num_drafts: int, after_hit: bool) -> list[float]:
        """Estimated hit rate with 0, 1, … branches, up to the configured budget, split as in `counts`."""
        key = (num_drafts, after_hit)
        chances = self._chances.get(key)
        if chances is None:
            probs, miss = self.accept_probs(num_drafts, after_hit), self._miss_law(num_drafts)
            chances = self._chances[key] = [
                sum(prob * (1 - miss(k, count)) for k, (prob, count) in enumerate(zip(probs, counts)))
                for counts in (self.counts(num_drafts, after_hit, budget) for budget in range(self._budget + 1))
            ]
        return chances

    def survival(self, num_drafts: int, after_hit: bool) -> list[float]:
        """Estimated chance that at least 1, 2, … `num_drafts` drafts of a round are accepted."""
        return survival(self.accept_probs(num_drafts, after_hit))

    def accept_probs(self, num_drafts: int, after_hit: bool) -> list[float]:
        """Estimated P(k) for a round of `num_drafts` drafts: num_drafts + 1 probabilities that sum to 1."""
        n = PRIOR_OBSERVATIONS
        longest = len(self._rounds[after_hit]) - 1
        tried, accepted = [0.0] * longest, [0.0] * longest
        for m, rounds in enumerate(self._rounds[after_hit]):
            at_least = sum(rounds)
            for j in range(m):
                tried[j] += at_least
                at_least -= rounds[j]
                accepted[j] += at_least
        pooled = (sum(accepted) + n * PRIOR_ACCEPTANCE[after_hit]) / (sum(tried) + n)
        probs, survival = [], 1.0
        for j in range(num_drafts):
            longer = survival * (accepted[j] + n * pooled) / (tried[j] + n)
            probs.append(survival - longer)
            survival = longer
        return [*probs, survival]

    def acceptance(self, num_drafts: int, after_hit: bool) -> list[float]:
        """Estimated chance that each of `num_drafts` drafts is accepted, given that all before it were."""
        rates = self._rates.get((num_drafts, after_hit))
        if rates is None:
            reached = [1.0, *self.survival(num_drafts, after_hit)]
            rates = [longer / shorter for shorter, longer in zip(reached, reached[1:])]
            self._rates[num_drafts, after_hit] = rates
        return rates

    def gains(self, is_full: bool) -> list[float]:
        """Estimated chance that the bonus token has rank 0, 1, … 15, after a rejection or full acceptance."""
        gains = self._gains.get(is_full)
        if gains is None:
            law = self._miss_law(0)
            miss = [law(0 if is_full else -1, count) for count in range(MAX_LEARNED_FAN_OUT + 1)]
            gains = self._gains[is_full] = [fewer - more for fewer, more in zip(miss, miss[1:])]
        return gains

    def _miss_law(self, num_drafts: int) -> Callable[[int, int], float]:
        n, laws = PRIOR_OBSERVATIONS, []
        for full in (False, True):
            first = (self._first[full] + n * PRIOR_FIRST[full]) / (self._ranked[full] + n)
            r = (self._later[full] + n * PRIOR_EXPONENT) / (self._log_ranks[full] + n)
            laws.append((1 - first, -r))

        def miss(k: int, count: int) -> float:
            scale, exponent = laws[k == num_drafts]
            return scale * count**exponent if count else 1.0

        return miss

    def _halve(self) -> None:
        self._evidence //= 2
        tables = [*self._rounds[True], *self._rounds[False], self._ranked, self._first, self._later, self._log_ranks]
        for table in tables:
            table[:] = [value / 2 for value in table]


def scale_down(counts: list[int], budget: int) -> list[int]:
    """Shrink counts proportionally so that they sum to at most `budget`, by largest remainder."""
    total = sum(counts)
    if total <= budget:
        return counts
    shares = [count * budget / total for count in counts]
    scaled = [int(share) for share in shares]
    by_remainder = sorted(range(len(counts)), key=lambda k: scaled[k] - shares[k])
    for k in by_remainder[: budget - sum(scaled)]:
        scaled[k] += 1
    return scaled
