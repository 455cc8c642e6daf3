"""Choose which outcomes of a round to predict."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np

from vllm_ssd.drafter.noise import acceptance_uniforms
from vllm_ssd.drafter.sequence import Sequence
from vllm_ssd.link.protocol import UNKNOWN_NOISE
from vllm_ssd.policy import Confidence, Draws, FanOut, confidence_levels, uniform_offsets

MAX_REQUESTS = 16
"""Most requests for which branches are split by the round's own probabilities, and candidates ranked by seeded noise.
The former takes 41 µs per request, for which the next step has to wait."""


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
            self._confidence.observe(
                _draws(sequence), len(drafts), of_drafts, accept_length, levels[accept_length], rank
            )

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
        return self._confidence.counts(_draws(sequence), *sequence.levels, sequence.after_hit, budget)


def _draws(sequence: Sequence) -> Draws:
    if not sequence.temperature:
        return Draws.GREEDY
    return Draws.SAMPLED if sequence.noise.kind == UNKNOWN_NOISE else Draws.FORESEEN


def _levels(sequence: Sequence, num_forks: int) -> tuple[list[int | None], np.ndarray]:
    """Confidence levels of the drafts at the first `num_forks` fork points, and of the other candidates there.

    -> levels of drafts, None if unknown; levels of candidates [num_forks, C] int64, -1 in the draft's place and where
    unknown. A draft that the drafter did not draw itself gets its probability as a candidate, or the last candidate's;
    none if the target's noise is part of these. The other candidates' probabilities are renormalised without the
    draft's.
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
    drawn = np.array([candidates.drawn for _, candidates in found])
    was_drawn = drawn == np.array(named)[known]
    draft_probs = np.where(of_draft > 0, of_draft, probs[:, -1])
    draft_probs = np.where(was_drawn, [candidates.draft_prob for _, candidates in found], draft_probs)
    is_known = was_drawn | (_draws(sequence) != Draws.FORESEEN)
    uniforms = acceptance_uniforms(sequence.noise, length, len(drafts)) or [0.0] * len(drafts)
    offsets = uniform_offsets(uniforms)
    for k, level, known_one in zip(known, confidence_levels(draft_probs).tolist(), is_known.tolist()):
        if k < len(drafts) and known_one:
            drafts[k] = level + offsets[k]
    if len(known) == num_forks:
        return drafts, levels
    others = np.full((num_forks, levels.shape[1]), -1)
    others[known] = levels
    return drafts, others
