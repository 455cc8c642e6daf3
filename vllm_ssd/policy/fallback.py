"""Drafts for a row whose outcome was not predicted: just in time, by n-gram match, or none."""

from collections.abc import Sequence

import numpy as np

WAIT_MARGIN = 0.05
"""Relative margin by which the gain from waiting for just-in-time drafts must exceed its cost."""
NGRAM_PRIOR, NGRAM_PRIOR_ROUNDS = 0.5, 4.0
"""Prior acceptance rate of an n-gram draft, and its weight in rounds."""
NGRAM_MEMORY = 0.99
"""Factor on the weight of earlier rounds, per round that tried a position."""
NGRAM_PROBE = 32
"""Consecutive matches that go unused before n-gram drafts are tried again."""


def ngram_drafts(token_ids: np.ndarray, num_drafts: int, min_n: int, max_n: int) -> list[int]:
    """Draft the tokens that followed the latest earlier occurrence of the longest matching suffix.

    token_ids [L] int32, oldest first; the suffix has between min_n and max_n tokens.
    -> num_drafts token ids, or an empty list without a match. If fewer than num_drafts tokens follow the match, they
    repeat.
    """
    last = len(token_ids) - 1
    ends = np.flatnonzero(token_ids[:-1] == token_ids[-1:])
    length, best = 1, ends
    while length < max_n and ends.size:
        ends = ends[ends >= length]
        ends = ends[token_ids[ends - length] == token_ids[last - length]]
        if ends.size:
            length, best = length + 1, ends
    if length < min_n or not best.size:
        return []
    end = int(best[-1])
    period = token_ids[end + 1 : end + 1 + num_drafts].tolist()
    return [period[i % len(period)] for i in range(num_drafts)]


def jit_drafts(
    num_missed: int,
    max_drafts: int,
    accept_survival: Sequence[float],
    tokens_per_second: float,
    first_s: float,
    step_s: float,
    bound_s: float,
) -> int:
    """Number of just-in-time drafts that the whole batch should wait for; 0 means not to wait.

    `accept_survival[j - 1]`: chance that at least j drafts are accepted; tokens_per_second: rate of the whole batch;
    first_s + n * step_s: the wait for n drafts, which must not exceed bound_s. Waiting pays if the `num_missed` rows
    gain at least 5 % more tokens than the batch loses.
    """
    best, best_net, gain = 0, 0.0, 0.0
    for num_drafts, survival in enumerate(accept_survival[:max_drafts], start=1):
        wait_s = first_s + num_drafts * step_s
        if wait_s > bound_s:
            break
        gain += num_missed * survival
        net = gain - tokens_per_second * wait_s
        if net > best_net and gain > (1 + WAIT_MARGIN) * tokens_per_second * wait_s:
            best, best_net = num_drafts, net
    return best


def jit_gain(
    num_missed: int, num_drafts: int, accept_survival: Sequence[float], tokens_per_second: float, wait_s: float
) -> float:
    """Tokens that the batch gains by waiting `wait_s` for `num_drafts` just-in-time drafts in each missed row."""
    return num_missed * sum(accept_survival[:num_drafts]) - tokens_per_second * wait_s


class NgramGain:
    """How many n-gram drafts a missed row should carry, and how many tokens they gain.

    Learns the acceptance rate by draft position; older rounds decay.
    """

    def __init__(self, max_drafts: int) -> None:
        self._tried = [0.0] * max_drafts
        self._passed = [0.0] * max_drafts
        self._unused = 0

    def observe(self, num_drafts: int, accept_length: int) -> None:
        """Learn from a round that verified `num_drafts` n-gram drafts and accepted `accept_length` of them."""
        for j in range(min(num_drafts, accept_length + 1)):
            self._tried[j] = NGRAM_MEMORY * self._tried[j] + 1
            self._passed[j] = NGRAM_MEMORY * self._passed[j] + (j < accept_length)

    def drafts(self, max_drafts: int, lost_per_draft: float) -> tuple[int, float]:
        """Best number of drafts and the tokens they gain; (0, 0.0) if none gains.

        lost_per_draft: tokens that the batch could emit in the time that verifying one more draft takes. After 32
        consecutive calls without a gain it returns (max_drafts, 0.0) once, to measure acceptance again.
        """
        best, best_net, net, survival = 0, 0.0, 0.0, 1.0
        for j in range(max_drafts):
            prior = NGRAM_PRIOR_ROUNDS
            survival *= (self._passed[j] + NGRAM_PRIOR * prior) / (self._tried[j] + prior)
            net += survival - lost_per_draft
            if net > best_net:
                best, best_net = j + 1, net
        self._unused = 0 if best else self._unused + 1
        if self._unused == NGRAM_PROBE:
            self._unused = 0
            return max_drafts, 0.0
        return best, best_net
