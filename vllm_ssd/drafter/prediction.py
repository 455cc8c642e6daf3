"""Choose which outcomes of a round to predict."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np

from vllm_ssd.drafter.sequence import Sequence
from vllm_ssd.policy import Confidence, FanOut, confidence_levels

MAX_REQUESTS = 16
"""Most requests for which branches are split by the round's own probabilities. This takes 41 µs per request, for which
the next step has to wait."""


class OutcomePrediction:
    """Splits a request's branches over its fork points, and learns from outcomes.

    With few requests the split follows the drafter's probabilities of this round's drafts and candidates, as far as
    they are known; otherwise `fan_out` decides.
    """

    def __init__(self, fan_out: FanOut) -> None:
        self._fan_out = fan_out
        self._confidence = Confidence(fan_out)
        self._by_confidence = not fan_out.is_fixed

    def observe(self, sequence: Sequence, accept_length: int, bonus_token: int) -> None:
        """Learn from an outcome before the spine follows it; ignored if its fork point is not computed yet."""
        candidates = sequence.candidates.get(sequence.length - 1 + accept_length)
        if candidates is None:
            return
        drafts = sequence.tokens[sequence.length :]
        draft = drafts[accept_length] if accept_length < len(drafts) else None
        others = [token for token in candidates.token_ids.tolist() if token != draft]
        rank = others.index(bonus_token) if bonus_token in others else None
        self._fan_out.observe(len(drafts), accept_length, rank, sequence.after_hit, len(others))
        if self._by_confidence:
            of_drafts, levels = sequence.levels or _levels(sequence, accept_length + 1)
            if levels[accept_length].max() < 0:  # its candidates were computed after the split
                of_drafts, levels = _levels(sequence, accept_length + 1)
            sampled = sequence.temperature > 0
            self._confidence.observe(sampled, len(drafts), of_drafts, accept_length, levels[accept_length], rank)

    def hit_chances(self, num_drafts: int) -> SequenceOf[float]:
        """Estimated hit rate after a hit, with 0, 1, … branches up to the configured budget."""
        if not self._by_confidence:
            return self._fan_out.hit_chances(num_drafts, True)
        return self._confidence.hit_chances(num_drafts)

    def counts(self, sequence: Sequence, budget: int, num_requests: int) -> SequenceOf[int]:
        """Branches by accept length for the round that begins, at most `budget` in total.

        num_requests: number of open requests
        """
        self._by_confidence = not self._fan_out.is_fixed and num_requests <= MAX_REQUESTS
        num_drafts = len(sequence.tokens) - sequence.length
        if not self._by_confidence or sequence.length - 1 not in sequence.candidates:  # no probabilities known yet
            sequence.levels = None
            return self._fan_out.counts(num_drafts, sequence.after_hit, budget)
        sequence.levels = _levels(sequence, num_drafts + 1)
        return self._confidence.counts(sequence.temperature > 0, *sequence.levels, sequence.after_hit, budget)


def _levels(sequence: Sequence, num_forks: int) -> tuple[list[int | None], np.ndarray]:
    """Confidence levels of the drafts at the first `num_forks` fork points, and of the other candidates there.

    -> levels of drafts, None if unknown; levels of candidates [num_forks, C] int64, -1 in the draft's place and where
    unknown. A draft that is not a candidate gets the last candidate's probability. The other candidates' probabilities
    are renormalised without the draft's.
    """
    first, length = sequence.length - 1, sequence.length
    drafts: list[int | None] = [None] * min(num_forks, len(sequence.tokens) - length)
    found = [(k, sequence.candidates[first + k]) for k in range(num_forks) if first + k in sequence.candidates]
    if not found:
        return drafts, np.full((num_forks, 1), -1)
    known = [k for k, _ in found]
    probs = np.array([candidates.probs for _, candidates in found])
    named = sequence.tokens[length : length + num_forks] + [-1] * num_forks
    is_draft = np.array([candidates.token_ids for _, candidates in found]) == np.array([[named[k]] for k in known])
    of_draft = (probs * is_draft).sum(1)
    levels = confidence_levels(probs / np.maximum(1 - of_draft, 1e-6)[:, None])
    levels[is_draft] = -1
    draft_levels = confidence_levels(np.where(of_draft > 0, of_draft, probs[:, -1])).tolist()
    for k, level in zip(known, draft_levels):
        if k < len(drafts):
            drafts[k] = level
    if len(known) == num_forks:
        return drafts, levels
    others = np.full((num_forks, levels.shape[1]), -1)
    others[known] = levels
    return drafts, others
